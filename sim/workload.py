"""Workloads: which of a trace's tokens share a forward pass, and in what order the passes run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from policies.contract import Future, Ints
from sim.events import Events, future_of, make_events
from traces.errors import InputError
from traces.trace import DECODE, PREFILL, Trace


@dataclass(frozen=True, eq=False)
class Workload:
    """Steps in the order in which they run; step s processes the trace's rows ``rows[offsets[s]:offsets[s + 1]]``."""

    name: str
    trace: Trace
    rows: Ints
    offsets: Ints
    """[S + 1]"""
    decode: npt.NDArray[np.bool_]
    """[S] True where the step makes tokens, False where it only reads a prompt."""

    @property
    def tokens(self) -> int:
        """How many tokens all steps process."""
        return len(self.rows)

    @cached_property
    def request(self) -> Ints:
        """[N] request of every processed token, in order."""
        return self.trace.request[self.rows].astype(np.int64)

    @cached_property
    def context(self) -> Ints:
        """[S] tokens that attention reads in each step, over all its requests: each reads up to its last token once."""
        request = self.request.tolist()
        length = (self.trace.position[self.rows].astype(np.int64) + 1).tolist()
        steps = pairwise(self.offsets.tolist())
        last = (dict(zip(request[start:end], length[start:end], strict=True)) for start, end in steps)
        return np.array([sum(lengths.values()) for lengths in last], np.int64)

    @cached_property
    def events(self) -> Events:
        """The distinct experts of every (step, layer)."""
        return make_events(self.trace.experts[self.rows], self.offsets, self.trace.model.experts)

    @cached_property
    def future(self) -> Future:
        """What clairvoyant policies receive."""
        return future_of(self.events)


def make_workload(trace: Trace, order: str = "one_request", batch: int = 1, phases: str = "all") -> Workload:
    """Arrange a trace into steps.

    `order` is ``recorded`` (the passes of the recording), ``one_request`` (requests one after another, each its prompt
    in one pass and then token by token) or ``continuous`` (up to `batch` requests at a time: a request that ends makes
    room for the next, whose prompt runs as a pass of its own). `phases` is ``all`` or ``decode`` (prompts left out).

    Raises InputError for other values, and where nothing is left to run.
    """
    if order not in ("recorded", "one_request", "continuous"):
        raise InputError(f"workload.order is '{order}': known are recorded, one_request, continuous")
    if phases not in ("all", "decode"):
        raise InputError(f"workload.phases is '{phases}': known are all, decode")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise InputError(f"workload.batch is {batch!r}: it must be a whole number of requests, at least 1")
    steps = _recorded(trace) if order == "recorded" else _served(trace, batch if order == "continuous" else 1)
    if phases == "decode":
        decoded = [rows[trace.phase[rows] == DECODE] for rows in steps]
        steps = [rows for rows in decoded if len(rows)]
    if not steps:
        raise InputError(f"workload.phases is '{phases}', but the trace holds no such token")
    name = order if order != "continuous" else f"continuous_{batch}"
    return Workload(
        name=name if phases == "all" else f"{name}_decode",
        trace=trace,
        rows=np.concatenate(steps),
        offsets=np.cumsum([0] + [len(rows) for rows in steps], dtype=np.int64),
        decode=np.array([bool((trace.phase[rows] == DECODE).any()) for rows in steps]),
    )


def _recorded(trace: Trace) -> list[Ints]:
    """Return the rows of every recorded pass."""
    starts = np.flatnonzero(np.diff(trace.step, prepend=-1))
    return np.split(np.arange(trace.tokens), starts[1:])


def _served(trace: Trace, batch: int) -> list[Ints]:
    """Return the rows of every pass when up to `batch` requests are served at a time."""
    waiting = [np.flatnonzero(trace.request == request) for request in np.unique(trace.request)]
    waiting.reverse()
    running: list[list[int]] = []
    steps: list[Ints] = []
    while waiting or running:
        while waiting and len(running) < batch:
            rows = waiting.pop()
            prompt = rows[trace.phase[rows] == PREFILL]
            if len(prompt):
                steps.append(prompt)
            answer = rows[trace.phase[rows] == DECODE].tolist()
            if answer:
                running.append(answer[::-1])
        if running:
            steps.append(np.array([answer.pop() for answer in running], np.int64))
        running = [answer for answer in running if answer]
    return steps
