"""What the executor's own kernels, copies and host thread take on this machine, by model shape.

Short replays of made-up routing in a decoder as deep as the model, with few experts a layer, between marks on the device:
everything resident, everything missing, everything prefetched just before it is needed. `profile.py` makes constants of the
samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from real.calibration.fitting import quietest
from real.decoder import ModelShape
from real.replay import Cell, Measured, Model, run_cell
from real.timeline import MARKS
from traces import save_trace
from traces.synthetic import synthesize

EXPERTS = 16
"""Of a layer of the decoder, unless a token needs more than half of them."""

MOST_BYTES = 8 << 30
"""Of all its experts: a deeper decoder loses layers. A decoder of four was too quick for OLMoE's sixteen: the host decided 3
microseconds sooner, and groups of experts took 2 less (docs/validation.md)."""

ROUNDS = 3
"""The runs of a shape alternate so often, and of every quantity the quietest round counts: a machine is slow at times."""

CONTEXTS = (128, 4096)
"""Lengths of the KV cache at which attention is timed."""

Samples = list[float]

_WAITS = {
    "predictor": {"_target_": "policies.predictor.none.NoPrediction"},
    "prefetch": {"_target_": "policies.prefetch.none.NoPrefetch"},
    "eviction": {"_target_": "policies.eviction.lru.LRU"},
    "allocation": {"_target_": "policies.allocation.whole_device.WholeDevice"},
    "miss": {"_target_": "policies.miss.wait.Wait"},
}
_PREFETCHES = {
    **_WAITS,
    "predictor": {"_target_": "policies.predictor.oracle.Oracle"},
    "prefetch": {"_target_": "policies.prefetch.top_n.TopN", "n": None, "depth": 1},
}


_AHEAD = 8
_LOOKS_AHEAD = {**_PREFETCHES, "prefetch": {"_target_": "policies.prefetch.top_n.TopN", "n": None, "depth": _AHEAD}}


class ShapeTimes(NamedTuple):
    """Samples of one shape at batch 1, ns."""

    attention: dict[int, Samples]
    """Attention and gate of a layer, by length of the KV cache."""
    shared: Samples
    """Its shared experts; all 0 where it has none."""
    attention_beside: Samples
    """The same at the shortest length while the link is busy."""
    gap: Samples
    """From the end of a layer's experts to the start of what follows, which the host has issued before."""
    groups: dict[int, Samples]
    """A group of routed experts, by how many."""
    group_beside: Samples
    """A group of one while the link is busy."""
    step: Samples
    """Embedding, last norm, head and the choice of a token."""
    copy_first: Samples
    """An expert's copy on an idle link."""
    copy_behind: Samples
    """An expert's copy behind another one."""
    gate_issue: Samples
    """The host issues attention and gate of a layer."""
    gate_to_residents: Samples
    """From the end of a gate, and of shared experts if there are any, until the experts start, all of them resident."""
    gate_to_copy: Samples
    """From a gate's end until the first copy of what is missing starts."""
    landing_to_experts: Samples
    """From the end of the last copy until its expert starts."""
    ahead: Samples
    """The host's time for predicting one layer ahead."""
    step_issue: Samples
    """The host's time between a step's last experts and the next step's first gate."""


MODELS = {
    "olmoe_1b_7b": ModelShape(16, 64, 8, 2048, 1024, 0, 16, 50336),
    "qwen1_5_moe_a2_7b": ModelShape(24, 60, 4, 2048, 1408, 5632, 16, 152008),
    "deepseek_v2_lite": ModelShape(26, 64, 6, 2048, 1408, 2816, 16, 103070),
}
"""Decoders of the models that are measured by default (`real.cells.decoder_shape`)."""


def measure_executor(
    shapes: Mapping[str, ModelShape], say: Callable[[str], None], *, where: str = "cuda", steps: int = 8
) -> dict[str, ShapeTimes]:
    """Measure every shape; on a CPU the same code runs and its times mean nothing. Raises InputError."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in shapes.items():
            say(f"the executor on {name}")
            model = Model(_as_fits(shape, where), where)
            try:
                found[name] = _measure(model, Path(folder) / name, steps)
            finally:
                model.close()
    return found


def _as_fits(shape: ModelShape, where: str) -> ModelShape:
    """Return `shape` with few experts, and with as many of its layers as there is room for, but at least two."""
    experts = max(EXPERTS, 2 * shape.top_k)
    room = MOST_BYTES if where == "cpu" else min(MOST_BYTES, torch.cuda.mem_get_info()[0] // 2)
    return shape._replace(layers=min(shape.layers, max(room // (experts * shape.expert_bytes), 2)), experts=experts)


def _measure(model: Model, stem: Path, steps: int) -> ShapeTimes:
    shape = model.shape
    trace = synthesize(
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        requests=1,
        prefill_tokens=1,
        decode_tokens=2 * steps + 16,
        lookahead_depth=0,
    )
    paths = {}
    for context in CONTEXTS:
        paths[context] = stem.with_suffix(f".{context}.safetensors")
        shift = max(context - int(trace.position.max()) - 1, 0)
        save_trace(replace(trace, position=trace.position + shift), paths[context])

    def run(name: str, context: int, parts: Mapping[str, Any], slots: int, preload: bool = False) -> _Parts:
        system = {"name": name, "drop_unused_prefetches": False, "reupload_after_use": False, **parts}
        cell = Cell(
            name=name,
            trace=str(paths[context]),
            workload={"order": "one_request", "batch": 1, "phases": "decode"},
            model=shape._asdict(),
            system=system,
            slots=slots,
            warmup=4,
            steps=steps,
            marked=steps,
            seed=0,
            layer_ns=1,
            transfer_ns=1,
            chunk_bytes=4 << 20,
            window_bytes=8 << 20,
            preload=preload,
        )
        return _Parts(run_cell(cell, model), cell)

    everything = shape.layers * shape.experts
    short, *longer = CONTEXTS
    rounds = []
    for _ in range(ROUNDS):
        resident = run("all resident", short, _WAITS, everything, preload=True)
        missing = run("all missing", short, _WAITS, shape.top_k)
        prefetched = run("prefetched late", short, _PREFETCHES, 3 * shape.top_k)
        ahead = run("all resident, looking ahead", short, _LOOKS_AHEAD, everything, preload=True)
        rounds.append(_samples(shape, resident, missing, prefetched, ahead))
    found = {name: _quietest([each[name] for each in rounds]) for name in rounds[0] if name != "ahead"}
    # Of a difference of two, which noise makes smaller as well as larger, all rounds count.
    found["ahead"] = [sample for each in rounds for sample in each["ahead"]]
    for context in longer:
        found["attention"][context] = run("all resident", context, _WAITS, everything, preload=True).inner_attention
    return ShapeTimes(**found)


def _samples(shape: ModelShape, resident: _Parts, missing: _Parts, prefetched: _Parts, ahead: _Parts) -> dict[str, Any]:
    """Return what one round gave, by the fields of `ShapeTimes`."""
    return {
        "attention": {CONTEXTS[0]: resident.inner_attention},
        "shared": [span * bool(shape.shared_width) for span in resident.spans("gate")],
        "attention_beside": prefetched.inner_attention,
        "gap": resident.spans("end"),
        "groups": {1: missing.last_groups, shape.top_k: resident.spans("start")},
        "group_beside": missing.other_groups,
        "step": resident.steps_ends,
        "copy_first": missing.copies(first=True),
        "copy_behind": missing.copies(first=False),
        "gate_issue": resident.gate_issue,
        "gate_to_residents": resident.until_experts("decide" if shape.shared_width else "gate"),
        "gate_to_copy": missing.gate_to_copy,
        "landing_to_experts": missing.landing_to_experts,
        "ahead": [(each - float(np.median(resident.look_ahead))) / _AHEAD for each in ahead.look_ahead],
        "step_issue": resident.step_issue,
    }


def _quietest(rounds: list[Any]) -> Any:
    """Return of every quantity its quietest round."""
    if isinstance(rounds[0], dict):
        return {key: _quietest([each[key] for each in rounds]) for key in rounds[0]}
    return quietest(rounds)


class _Parts:
    """The marked steps of a run, taken apart: spans from mark to mark."""

    def __init__(self, measured: Measured, cell: Cell) -> None:
        timeline = measured.timeline
        self.marks, self._copies = timeline.device_marks(), timeline.copy_marks()
        timed = slice(cell.warmup, cell.warmup + cell.steps)
        begin, issued, looked_ahead, *_ = np.moveaxis(timeline.stamps[timed], 2, 0)
        self.look_ahead: Samples = _floats((looked_ahead - issued).ravel())
        self.gate_issue: Samples = _floats((issued - begin).ravel())
        self.step_issue: Samples = _floats(begin[1:, 0] - timeline.stamps[timed, -1, -1][:-1])
        self._span = np.diff(self.marks[:, 3])
        self._kind, self._layer = self.marks[:-1, 2], self.marks[:-1, 1]
        self._event = self.marks[:, 0] * timeline.layers + self.marks[:, 1]

    def spans(self, kind: str) -> Samples:
        """Return how long what begins with marks of `kind` took."""
        return _floats(self._span[self._kind == MARKS.index(kind)])

    @property
    def inner_attention(self) -> Samples:
        """Return attention and gate of all layers but a step's first, before which the embedding comes."""
        return _floats(self._span[self._attention(inner=True)])

    @property
    def steps_ends(self) -> Samples:
        """Return head and embedding together, one per step."""
        embedding = np.median(self._span[self._attention(inner=False)]) - np.median(self.inner_attention)
        return [span + max(0.0, float(embedding)) for span in self.spans("head")]

    def until_experts(self, kind: str) -> Samples:
        """Return the time from each mark of `kind` to the start of the experts, where there is one of both an event."""
        begins, starts = (self.marks[self.marks[:, 2] == MARKS.index(name), 3] for name in (kind, "start"))
        return _floats(starts - begins)

    def _attention(self, *, inner: bool) -> Any:
        """Return which spans are attention and gate of a step's first layer, behind the embedding, or the others."""
        return (self._kind == MARKS.index("attention")) & ((self._layer > 0) == inner)

    @property
    def last_groups(self) -> Samples:
        """Return the groups that end an event, after which nothing moves."""
        return _floats(self._groups[self._is_last])

    @property
    def other_groups(self) -> Samples:
        """Return the groups beside which the link goes on."""
        return _floats(self._groups[~self._is_last])

    @property
    def _groups(self) -> Any:
        return self._span[self._kind == MARKS.index("start")]

    @property
    def _is_last(self) -> Any:
        event = self._event[:-1][self._kind == MARKS.index("start")]
        return np.append(event[1:] != event[:-1], True)

    def copies(self, *, first: bool) -> Samples:
        """Return the times of whole copies: each event's first one, or those behind it."""
        event = self._copies[:, 0]
        is_first = np.append(True, event[1:] != event[:-1])
        spans = self._copies[:, 4] - self._copies[:, 3]
        return _floats(spans[is_first if first else ~is_first])

    @property
    def gate_to_copy(self) -> Samples:
        """Return the time from each event's gate to its first copy."""
        copies = self._copies
        first = copies[np.append(True, copies[1:, 0] != copies[:-1, 0])]
        ends = self._by_event(MARKS.index("gate"))  # of the gate, whatever shared experts follow
        return [float(start - ends[event]) for event, start in zip(first[:, 0], first[:, 3], strict=True) if event in ends]

    @property
    def landing_to_experts(self) -> Samples:
        """Return the time from each event's last landing to the start of its last group."""
        copies = self._copies
        last = copies[np.append(copies[1:, 0] != copies[:-1, 0], True)]
        starts = self._by_event(MARKS.index("start"))
        return [float(starts[event] - end) for event, end in zip(last[:, 0], last[:, 4], strict=True) if event in starts]

    def _by_event(self, kind: int) -> dict[int, int]:
        """Return the time of each event's last mark of `kind`."""
        chosen = self.marks[:, 2] == kind
        return dict(zip(self._event[chosen].tolist(), self.marks[chosen, 3].tolist(), strict=True))


def _floats(values: Any) -> Samples:
    return [float(value) for value in values]
