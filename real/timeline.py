"""When everything happened: host stamps always, device marks where asked for; nothing here waits for the device.

A host stamp costs a tenth of a microsecond, a device mark some microseconds of host time, so marks can be left out to see
what they cost. `Timeline.device_times` turns them into the terms of the memory model (docs/model.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from policies.contract import Ints
from real.device import COMPUTE, COPY, Device

STAMPS = ("begin", "gate_issued", "looked_ahead", "routed", "decided", "experts_issued")
"""Host stamps of every (step, layer): it begins to issue attention and gate; has issued them; has issued shared experts and
predicted what was still to be predicted; knows the routed experts; has decided, and unless the link is busy anyway started
the first demand; has issued the experts."""

HOST_PARTS = ("issue_gate", "look_ahead", "await_gate", "decide_and_feed", "issue_experts", "between_layers")
"""What the host thread does in a layer, from stamp to stamp and on to the next layer's first: it issues attention and gate;
issues shared experts, and if the layer before had to await nothing, predicts from it and starts prefetches; waits for the
gate's result, which is no work; decides, and unless the link is busy anyway starts the first demand; issues the experts and
further demands, and if it has to await something, predicts and starts prefetches; feeds the link before the next layer of
the step. Whatever predicts in live mode waits for what the predictor sees, which comes behind the residents' experts."""

MARKS = ("attention", "gate", "decide", "wait", "start", "end", "head", "step_end")
"""Places in the compute stream: before attention; after the gate; after the shared experts; before it waits for a transfer;
before and after a group of experts; before and after the head."""

_ATTENTION, _GATE, _DECIDE, _WAIT, _START, _END, _HEAD, _STEP_END = range(len(MARKS))

_AFTER_MARK = ("attention", "shared", "host", "wait", "experts", "host", "step", "host")
"""What the compute stream does from a mark to the next one, by mark; `host` where it stands still for the host thread."""

Spans = list[tuple[str, str, int, int, int, int]]
"""Fields of `sim.reference.Span`, whose key is -1: a group of experts is one span, ``experts``."""


class DeviceTimes(NamedTuple):
    """Where the compute stream's time went in every marked step, ns; S steps. compute + wait + host is the duration."""

    compute: Ints
    wait: Ints
    host: Ints
    """It stood still for the host thread."""
    attention: Ints
    """Part of compute: attention, gate and shared experts of all layers."""
    experts: Ints
    """Part of compute: routed experts of all layers."""
    head: Ints
    """Part of compute: the step's end."""
    link_busy: Ints
    """Time the copy stream spent copying experts, by the step in which the copy was submitted."""
    burst_bytes_per_s: float
    """Rate of the link while the demands of events with at least two were served; NaN where there was none."""


class Timeline:
    """Stamps and marks of a run on `device`; device marks only if `marks` is true, or from `begin_marks` on."""

    def __init__(self, device: Device, layers: int, *, marks: bool = False) -> None:
        self.device = device
        self.layers = layers
        self.marks = marks
        """Whether to make device marks; may be switched on between two steps."""
        self.issued_ns = 0
        """When the last gate was issued."""
        self._step = self._layer = 0
        self._opened = (0, 0)
        self._stamps: list[int] = []
        self._marks: list[tuple[int, int, int, int]] = []
        """(step, layer, kind, mark)"""
        self._copies: list[tuple[int, int, int, int, int]] = []
        """(event, bytes, whether a demand, mark before, mark after)"""

    # ---- while it runs ---------------------------------------------------------------------------------------

    def begin_marks(self, steps: int) -> None:
        """Make device marks from now on, for about `steps` steps."""
        self.device.reserve_marks(steps * (self.layers * 24 + 2))
        self.marks = True

    def begin_step(self, step: int) -> None:
        """The host begins to issue a step."""
        self._step, self._layer = step, 0
        self._mark(_ATTENTION)

    def begin_layer(self, step: int, layer: int) -> None:
        """The host begins to issue attention and gate."""
        self._layer = layer
        self._stamps.append(time.perf_counter_ns())
        if layer:
            self._mark(_ATTENTION)

    def gate_issued(self) -> None:
        """Attention and gate are issued."""
        self._mark(_GATE)
        self.issued_ns = time.perf_counter_ns()
        self._stamps.append(self.issued_ns)

    def shared_issued(self) -> None:
        """Shared experts are issued."""
        self._mark(_DECIDE)

    def looked_ahead(self) -> None:
        """Nothing is left to be predicted from the layer before."""
        self._stamps.append(time.perf_counter_ns())

    def routed(self, ns: int) -> None:
        """The host knows the routed experts, and did so at `ns`."""
        self._stamps.append(ns)

    def decided(self) -> None:
        """The policies have decided, and the link is busy or has nothing to do."""
        self._stamps.append(time.perf_counter_ns())

    def experts_issued(self) -> None:
        """The event's experts are issued; what the compute stream gets next belongs to the step's end."""
        self._stamps.append(time.perf_counter_ns())
        if self._layer + 1 == self.layers:
            self._mark(_HEAD)

    def end_step(self, step: int) -> None:
        """The step's end is issued."""
        self._mark(_STEP_END)

    def mark_wait(self) -> None:
        """The compute stream is about to wait for a transfer."""
        self._mark(_WAIT)

    def mark_start(self) -> None:
        """A group of experts is about to be computed."""
        self._mark(_START)

    def mark_end(self) -> None:
        """A group of experts is computed."""
        self._mark(_END)

    def mark_copy(self, event: int, size: int, demand: bool, behind: bool, copy: Callable[[], None]) -> None:
        """Submit a copy of `size` bytes during `event` and mark its end, and its start unless it is `behind` another one."""
        before = self._copies[-1][-1] if behind and self._copies else self.device.mark(COPY)
        copy()
        self._copies.append((event, size, int(demand), before, self.device.mark(COPY)))

    def open_copy_marks(self, *, behind: bool) -> tuple[int, int]:
        """Return the events of marks that compiled code is to record before (unless `behind` another) and after a copy."""
        if not self.marks:
            return 0, 0
        before, first = (self._copies[-1][-1], 0) if behind and self._copies else self.device.open_mark()
        after, second = self.device.open_mark()
        self._opened = before, after
        return first, second

    def drop_copy_marks(self, events: tuple[int, int]) -> None:
        """Forget the marks of `open_copy_marks`: there was no copy."""
        if self.marks:
            self.device.drop_marks(sum(event != 0 for event in events))

    def note_copy(self, event: int, size: int) -> None:
        """Note the demand of `size` bytes between the marks of `open_copy_marks`."""
        if self.marks:
            self._copies.append((event, size, 1, *self._opened))

    def _mark(self, kind: int) -> None:
        if self.marks:
            self._marks.append((self._step, self._layer, kind, self.device.mark(COMPUTE)))

    # ---- afterwards ------------------------------------------------------------------------------------------

    @property
    def stamps(self) -> Ints:
        """[S, L, len(STAMPS)] host ns."""
        return np.array(self._stamps, np.int64).reshape(-1, self.layers, len(STAMPS))

    @property
    def step_ns(self) -> Ints:
        """[S - 1] host ns from one step's first gate to the next one's."""
        return np.diff(self.stamps[:, 0, STAMPS.index("routed")])

    def host_parts(self, steps: slice) -> dict[str, float]:
        """Return median host ns per layer by what they were spent on; waiting for the gate is not work."""
        return {part: found["median"] for part, found in host_per_layer(self.stamps[steps]).items()}

    def device_marks(self) -> Ints:
        """[marks, 4] step, layer, index into `MARKS`, host-clock ns; in stream order."""
        rows = [(step, layer, kind, self.device.mark_ns(mark)) for step, layer, kind, mark in self._marks]
        return np.array(rows, np.int64).reshape(-1, 4)

    def copy_marks(self) -> Ints:
        """[copies, 5] event, bytes, whether a demand, host-clock ns before and after; in the order of the copy stream."""
        ns = self.device.mark_ns
        rows = [(event, size, demand, ns(before), ns(after)) for event, size, demand, before, after in self._copies]
        return np.array(rows, np.int64).reshape(-1, 5)

    def device_times(self) -> DeviceTimes | None:
        """Return where the time of every marked step went; None where no marks were made."""
        if not self._marks:
            return None
        rows = self.device_marks()
        first = int(rows[0, 0])
        steps = int(rows[-1, 0]) - first + 1
        step = rows[:-1, 0] - first
        spans = np.diff(rows[:, 3])
        kinds = rows[:-1, 2]

        def total(*wanted: int) -> Ints:
            chosen = np.isin(kinds, wanted)
            return np.bincount(step[chosen], weights=spans[chosen], minlength=steps).astype(np.int64)

        attention, experts, head, wait = total(_ATTENTION, _GATE), total(_START), total(_HEAD), total(_WAIT)
        ends = rows[rows[:, 2] == _STEP_END, 3]
        duration = np.diff(ends, prepend=rows[0, 3])
        compute = attention + experts + head
        busy, rate = self._link(first, steps)
        return DeviceTimes(compute, wait, duration - compute - wait, attention, experts, head, busy, rate)

    def _link(self, first: int, steps: int) -> tuple[Ints, float]:
        copies = self.copy_marks()
        step = np.maximum(copies[:, 0] // self.layers - first, 0)
        busy = np.bincount(step, weights=copies[:, 4] - copies[:, 3], minlength=steps)[:steps].astype(np.int64)
        moved = spent = 0
        for event in np.unique(copies[:, 0]):
            train = copies[(copies[:, 0] == event) & (copies[:, 2] == 1)]
            if len(train) > 1:
                moved += int(train[:, 1].sum())
                spent += int(train[-1, 4] - train[0, 3])
        return busy, moved / spent * 1e9 if spent else float("nan")


# ---- from stamps and marks that were kept ------------------------------------------------------------------------


def host_per_layer(stamps: Ints) -> dict[str, dict[str, float]]:
    """Return ``median``, ``p10`` and ``p90`` over all layers of `stamps` [S, L, len(STAMPS)] of each of `HOST_PARTS`, ns.

    NaN where there is no layer.
    """
    inside = np.diff(stamps, axis=2)
    between = stamps[:, 1:, 0] - stamps[:, :-1, -1]
    found = {}
    for name, spent in zip(HOST_PARTS, (*np.moveaxis(inside, 2, 0), between), strict=True):
        p10, median, p90 = np.percentile(spent, (10, 50, 90)) if spent.size else (np.nan,) * 3
        found[name] = {"median": float(median), "p10": float(p10), "p90": float(p90)}
    return found


def spans_of(stamps: Ints, marks: Ints, steps: range, *, shared: bool) -> Spans:
    """Return what host thread and compute stream did in `steps`, which were all marked, by resource in order of time.

    `stamps` [S, L, len(STAMPS)] are of the steps from the first, `marks` [marks, 4] as `Timeline.device_marks` returns them;
    `shared` says whether the model has shared experts.
    """
    layers = stamps.shape[1]
    chosen = marks[(marks[:, 0] >= steps.start) & (marks[:, 0] < steps.stop)]
    if not shared:
        chosen = chosen[chosen[:, 2] != _GATE]
    found = []
    for (step, layer, kind, start), (*_, end) in pairwise(chosen.tolist()):
        found.append(("compute", _AFTER_MARK[kind], start, end, -1, step * layers + layer))
    rows: list[list[int]] = stamps[steps.start : steps.stop].reshape(-1, len(STAMPS)).tolist()
    following: list[list[int]] = [*rows[1:], []]
    for event, ((begin, gate_issued, looked_ahead, routed, decided, issued), after) in enumerate(
        zip(rows, following, strict=True), start=steps.start * layers
    ):
        found.append(("host", "gate", begin, gate_issued, -1, event))
        found.append(("host", "ahead", gate_issued, looked_ahead, -1, event))
        found.append(("host", "decide", routed, decided, -1, event))
        found.append(("host", "issue", decided, issued, -1, event))
        if after and event % layers == layers - 1:
            found.append(("host", "step", issued, after[0], -1, event))
    return [span for span in found if span[3] > span[2]]
