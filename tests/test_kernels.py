"""The GPU's path on a CPU: Triton's interpreter runs the kernels, and the decoder's parts stand in for their graphs."""

# ruff: noqa: E402  # what must be there comes first

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")
os.environ["TRITON_INTERPRET"] = "1"  # decided when a kernel is defined
pytest.importorskip("triton", reason="kernels need triton, which torch's CPU build does not bring")

from test_replay import cell_of, model, trace_path  # noqa: F401  # fixtures

import real.replay
from real import kernels
from real.decoder import ReplayDecoder
from real.device import COMPUTE
from real.replay import run_cell
from real.schedule import Schedule
from real.standin import StandIn


class Part:
    """Stands in for the graph of a part."""

    def __init__(self, device, part):
        self.device, self.part = device, part

    def replay(self):
        self.device.submit(COMPUTE, self.part)


class WithKernels(ReplayDecoder):
    """The decoder as it is on a GPU, but for the graphs."""

    @staticmethod
    def _use_kernels(where):
        return True

    def capture(self):
        for count in self._graph_sizes():
            self._graphs |= {place: Part(self.device, part) for place, part in self._parts(count).items()}


def test_kernels_and_rings_give_the_same_output_when_experts_are_offloaded(trace_path, model, monkeypatch):  # noqa: F811
    """Steps of prompts, of one token and of two; the interpreter is slow, so there are few."""
    few = {"order": "continuous", "batch": 2, "steps": 6}
    plain = run_cell(cell_of(trace_path, **few), model)
    monkeypatch.setattr(real.replay, "ReplayDecoder", WithKernels)
    resident = run_cell(cell_of(trace_path, preload=True, **few), model)
    device = StandIn("random", seed=1, schedule=Schedule(model.shape.expert_bytes))
    offloaded = run_cell(cell_of(trace_path, "next_gate", 12, **few), model, device)
    np.testing.assert_array_equal(resident.checksums, offloaded.checksums)
    assert (plain.chosen == resident.chosen).mean() > 0.9


def test_experts_by_slot_equal_plain_products():
    tokens, top_k, hidden, width, slots = 2, 3, 64, 40, 5
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(slots, 3 * hidden * width + 32, generator=random).bfloat16() * 0.1
    x = torch.randn(tokens, hidden, generator=random).bfloat16()
    slot_of = torch.tensor([0, 4, -1, 2, 3, 1], dtype=torch.int32)
    activation, output = torch.zeros(6, width), torch.full((6, hidden), 7.0)
    kernels.experts_by_slot(x, pool, slot_of, activation, output, top_k)
    for entry, slot in enumerate(slot_of.tolist()):
        expected = torch.full((hidden,), 7.0)
        if slot >= 0:
            gate_up = pool[slot, : 2 * width * hidden].view(2 * width, hidden).float()
            gate, up = (gate_up @ x[entry // top_k].float()).split(width)
            down = pool[slot, 2 * width * hidden : 3 * width * hidden].view(hidden, width).float()
            expected = down @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(output[entry], expected, atol=1e-4, rtol=1e-4)


def test_routing_is_forced_and_weighed_by_the_gate():
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    forced = torch.tensor([[[0, 1, 2]] * 4, [[3, 6, -1], [5, 0, 1], [0, 0, 0], [0, 0, 0]]], dtype=torch.int32)
    gate, words = torch.zeros(2, 3), torch.zeros(6, dtype=torch.int32)
    kernels.route(logits, forced, torch.tensor([1]), gate, words, 3)
    assert (words >> kernels.ID_BITS).tolist() == [2] * 6
    assert ((words & 2047) - 1).tolist() == [3, 6, -1, 5, 0, 1]
    shares = logits.softmax(1)
    torch.testing.assert_close(
        gate, torch.tensor([[shares[0, 3], shares[0, 6], 0], [shares[1, 5], shares[1, 0], shares[1, 1]]])
    )
