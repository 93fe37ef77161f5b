"""The GPU's path on a CPU: Triton's interpreter runs the kernels, and the decoder's parts stand in for their graphs."""

# ruff: noqa: E402  # what must be there comes first

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")
os.environ["TRITON_INTERPRET"] = "1"  # decided when a kernel is defined
pytest.importorskip("triton", reason="kernels need triton, which torch's CPU build does not bring")

from test_replay import cell_of, model, trace_path  # noqa: F401  # fixtures
from tiny_models import tiny_model

import real.replay
from real import kernels
from real.decoder import ReplayDecoder
from real.device import COMPUTE
from real.replay import run_cell
from real.schedule import Schedule
from real.standin import StandIn
from traces.recorder.routers import rank


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


def live_decoder_with_kernels():
    """Return the class of live mode's decoder as it is on a GPU, but for the graphs."""
    pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")
    from real.live.decoder import LiveDecoder

    class WithLiveKernels(LiveDecoder):
        @staticmethod
        def _use_kernels(where):
            return True

        def capture_experts(self, count=1):
            pass

        def _part(self, layer, count):
            return Part(self.device, super()._part(layer, count).replay)

    return WithLiveKernels


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


@pytest.mark.parametrize(("experts", "top_k", "ranks", "are_logits"), [(12, 3, 6, True), (40, 8, 16, False)])
def test_experts_are_ranked_as_the_recorder_ranks_them(experts, top_k, ranks, are_logits):
    """Equal scores and excluded groups among them, and a choice that is not the top of the scores."""
    random = torch.Generator().manual_seed(experts)
    scores = torch.randn(3, experts, generator=random)
    if not are_logits:
        scores = scores.sigmoid()
        scores[1, 5:9] = -float("inf")
    scores[0, :4] = 0.5
    ids = scores.topk(top_k).indices
    ids[2] = torch.randperm(experts, generator=random)[:top_k]
    words = torch.zeros(3 * ranks, dtype=torch.int64), torch.zeros(3 * ranks, dtype=torch.int64)
    turn = torch.tensor([6], dtype=torch.int32)
    kernels.publish_ranking(scores, ids, turn, words, ranks, are_logits=are_logits)
    ranked, shares = rank(scores, ids, ranks, are_logits=are_logits)
    assert all((word >> 32 == 7).all() for word in words)
    assert ((words[0] & 0xFFFFFFFF).view(3, ranks) == ranked).all()
    assert ((words[1] & 0xFFFFFFFF).to(torch.int32).view(torch.float32).view(3, ranks) == shares.half().float()).all()


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss"])
def test_live_kernels_give_the_same_tokens_when_experts_are_offloaded(architecture, tmp_path, monkeypatch):
    """The fused kernel, and transposed matrices with biases and the model's own gate between the two products."""
    with_kernels = live_decoder_with_kernels()
    import real.live.run
    from real.live.model import load_model
    from real.systems import composition, read_system

    tiny_model(architecture, num_hidden_layers=2).save_pretrained(tmp_path)
    live = load_model(str(tmp_path), "cpu")

    def generate(system, slots, **options):
        options = {"requests": 1, "new_tokens": 3, "most_prompt_tokens": 6, "prove": True, **options}
        with real.live.run.LiveRun(live, composition(read_system(system)), slots, **options) as run:
            return run.request([5, 9, 3, 17, 22, 60]).tokens, run.outcome().misses.sum()

    plain, _ = generate("lru", 16, preload=True)
    monkeypatch.setattr(real.live.run, "LiveDecoder", with_kernels)
    assert generate("lru", 16, preload=True) == (plain, 0)
    tokens, misses = generate("next_gate_lrfu", 4)
    assert tokens == plain
    assert misses > 0
    live.close()


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_the_peers_arm_on_our_kernel_gives_what_our_executor_gives(budget, monkeypatch):
    """In decode passes of both the kernel computes, over the slots of either; the interpreter is slow, so there are few."""
    with_kernels = live_decoder_with_kernels()
    import real.live.run
    from real.peers import arms
    from real.peers.__main__ import Task, build_model, run_arm

    monkeypatch.setattr(real.live.run, "LiveDecoder", with_kernels)
    monkeypatch.setattr(arms._CacheForOurKernel, "_use_kernels", staticmethod(lambda where: True))
    built, tasks = build_model("tiny", "cpu"), [Task([5, 9, 3, 17, 22, 60], [11, 99, 3])]
    theirs = run_arm(arms.PerLayerLRU(budget, our_kernel=True), built, tasks)
    ours = run_arm(arms.Ours("lru_per_layer", budget, graphs=False), built, tasks)
    plain = run_arm(arms.Resident("eager"), built, tasks)
    assert theirs["tokens"] == ours["tokens"] == plain["tokens"]
    assert theirs["bytes_h2d"] == ours["bytes_h2d"] > 0
    built.close()
