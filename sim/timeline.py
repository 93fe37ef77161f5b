"""Timelines: runs as a Chrome trace (.json.gz), which Perfetto opens, several side by side in one file.

A run is told by its log: the words of the engines' and of the executor's logs are the same. A simulated run is told by the
reference engine's spans too, which say what every resource did in every nanosecond; a measured one by what its device marks
say of the compute stream and its stamps of the host thread.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sim.config import Config
from sim.experiment import costs_of, system_of, workload_of
from sim.reference import Span, run_reference
from sim.result import Run
from traces.atomic import write_atomically
from traces.errors import InputError

LAYERS, COMPUTE, HOST, H2D = 1, 2, 3, 4
_TRACKS = {LAYERS: "layers", COMPUTE: "compute stream", HOST: "host thread", H2D: "link, host to device"}
"""Names of a run's tracks, from the top down."""

_STARTS = {"load": "demand", "prefetch": "prefetch", "refresh": "refresh"}
"""Words of the log for the start of a transfer, with the kind of transfer that they start."""

_JUDGED = ("hit", "late_hit", "miss")

_COMPUTE = {
    "host": "wait for the host",
    "wait": "wait for a transfer",
    "attention": "attention and gate",
    "shared": "shared experts",
    "experts": "experts",
    "step": "head",
}
_HOST = {
    "gate": "issue gate",
    "decide": "decide",
    "issue": "issue experts",
    "experts": "decide, issue experts",
    "ahead": "look ahead",
    "step": "issue head",
}


class Recording(NamedTuple):
    """What is known of a run."""

    log: Sequence[Sequence[Any]]
    """Entries (ns, what, key, event)."""
    spans: Sequence[Span] = ()
    """What its resources did; of a measured run, host thread and compute stream in its last marked steps."""


class _Transfer:
    """One transfer of the log, with what became of it."""

    def __init__(self, kind: str, key: int, started: int, event: int) -> None:
        self.kind, self.key, self.started, self.event = kind, key, started, event
        self.ended: int | None = None
        self.outcome = "used" if kind == "demand" else "renewed" if kind == "refresh" else "wasted"
        self.used_in: int | None = None
        """The event that used it first."""


def record_run(config: Config) -> tuple[Recording, Run]:
    """Run the config's system in the reference engine and return what happened, and its integers. Raises InputError."""
    workload = workload_of(config)
    costs, _ = costs_of(config, workload)
    log: list[tuple[Any, ...]] = []
    spans: list[Span] = []
    run = run_reference(system_of(config, workload, costs), workload, costs, log, spans)
    return Recording(log, spans), run


def check_timeline(path: str | os.PathLike[str], last_steps: int | None) -> None:
    """Raise InputError where `path` cannot be a timeline's file or `last_steps` are none."""
    if not str(path).endswith(".json.gz"):
        raise InputError(f"timeline is '{path}': it must be a file NAME.json.gz")
    if not Path(path).parent.is_dir():
        raise InputError(f"timeline is '{path}': there is no folder {Path(path).parent}")
    if last_steps is not None and last_steps < 1:
        raise InputError(f"timeline_steps is {last_steps}: it must be at least 1, or null for all")


def write_run_timeline(path: str | os.PathLike[str], config: Config, last_steps: int | None) -> Path:
    """Write the last steps of the config's run, all where `last_steps` is None, and return `path`. Raises InputError."""
    check_timeline(path, last_steps)
    recording, run = record_run(config)
    model = workload_of(config).trace.model
    count = len(run.steps.compute)
    steps = range(0 if last_steps is None else max(0, count - last_steps), count)
    return write_timeline(path, {config["system"]["name"]: recording}, model.layers, model.experts, steps)


def write_timeline(
    path: str | os.PathLike[str], runs: Mapping[str, Recording], layers: int, experts: int, steps: range
) -> Path:
    """Write `steps` of every run in `runs`, by name, into `path` and return it. Each begins at 0 with its first event.

    Per run: a track of its layers; of the compute stream and the host thread where spans tell of them; of the link, each
    transfer with its layer, expert, kind and outcome; counters of the experts that hold a slot and of the transfers that
    were asked for and have not landed; and a flow from each prefetch to the use that it was for.
    """
    records: list[dict[str, Any]] = []
    for process, (name, recording) in enumerate(runs.items(), start=1):
        records += _Writer(recording, process, name, layers, experts, steps).records()
    content = json.dumps({"traceEvents": records, "displayTimeUnit": "ms"}).encode()
    write_atomically(Path(path), gzip.compress(content, mtime=0))
    return Path(path)


class _Writer:
    """One run, as the records of one process of the trace."""

    def __init__(self, recording: Recording, process: int, name: str, layers: int, experts: int, steps: range) -> None:
        self.log, self.spans = recording.log, recording.spans
        self.process, self.name = process, name
        self.layers, self.experts = layers, experts
        self.events = range(steps.start * layers, steps.stop * layers)
        self.transfers = list(_transfers(self.log))
        inside = [entry[0] for entry in self.log if entry[3] in self.events]
        inside += [span.start for span in self.spans if span.event in self.events]
        ends = [span.end for span in self.spans if span.event in self.events]
        self.start, self.end = min(inside, default=0), max([*inside, *ends], default=0)

    def records(self) -> Iterator[dict[str, Any]]:
        yield self._about("process_name", 0, {"name": self.name})
        for track, name in _TRACKS.items():
            if self.spans or track in (LAYERS, H2D):
                yield self._about("thread_name", track, {"name": name})
                yield self._about("thread_sort_index", track, {"sort_index": track})
        yield from self._layers()
        yield from self._resources()
        yield from self._link()
        yield from self._counters()

    def _layers(self) -> Iterator[dict[str, Any]]:
        """Give a slice for every event, from when it was judged to its end."""
        began: dict[int, int] = {}
        counts: dict[int, dict[str, int]] = {}
        free = self.start
        for ns, what, _, event in [*self.log, *self._last_end()]:
            if event not in self.events:
                continue
            if what in _JUDGED:
                began.setdefault(event, ns)
                counts.setdefault(event, dict.fromkeys(_JUDGED, 0))[what] += 1
            elif what == "end" and event in began:
                begins = max(began[event], free)
                free = max(begins, ns)
                yield self._slice(LAYERS, self._event(event), begins, free, counts[event])

    def _last_end(self) -> list[tuple[int, str, int, int]]:
        """Return the end of the run's last event, which a simulated log lacks: nothing came by to care."""
        last = max((entry[3] for entry in self.log), default=-1)
        if any(entry[1] == "end" and entry[3] == last for entry in self.log):
            return []
        ends = [entry[0] for entry in self.log if entry[3] == last]
        ends += [span.end for span in self.spans if span.event == last and span.what == "expert"]
        return [(max(ends), "end", -1, last)] if ends else []

    def _resources(self) -> Iterator[dict[str, Any]]:
        """Give a slice for whatever the compute stream and the host thread did or waited for."""
        for span in self.spans:
            if span.event not in self.events or span.resource not in ("compute", "host"):
                continue
            if span.resource == "host":
                yield self._slice(HOST, _HOST[span.what], span.start, span.end, {"event": span.event}, "host work")
                continue
            kind = span.what if span.what in ("wait", "host") else "compute"
            name = _COMPUTE.get(span.what) or self._expert(span.key)
            about = {"event": span.event, **({} if span.key < 0 else self._place(span.key))}
            yield self._slice(COMPUTE, name, span.start, span.end, about, kind)

    def _link(self) -> Iterator[dict[str, Any]]:
        """Give a slice for every time that the link was busy with a transfer, and the flow to what uses it."""
        uses = {(span.event, span.key): span for span in self.spans if span.what == "expert"}
        judged = {(entry[3], entry[2]): entry[0] for entry in self.log if entry[1] in _JUDGED}
        for flow, (transfer, busy) in enumerate(self._busy(), start=1):
            shown = [(begins, ends) for begins, ends in busy if begins >= self.start and begins < self.end]
            about = {**self._place(transfer.key), "kind": transfer.kind, "outcome": transfer.outcome}
            for begins, ends in shown:
                yield self._slice(H2D, f"{transfer.kind} {self._expert(transfer.key)}", begins, ends, about, transfer.kind)
            used_in = transfer.used_in
            if used_in is None or used_in not in self.events or not shown:
                continue
            use = uses.get((used_in, transfer.key))
            at, track = (use.start, COMPUTE) if use else (judged[used_in, transfer.key], LAYERS)
            common = {"name": "prefetch to use", "cat": "flow", "id": flow, "pid": self.process}
            yield {**common, "ph": "s", "tid": H2D, "ts": self._us(shown[-1][0])}
            yield {**common, "ph": "f", "bp": "e", "tid": track, "ts": self._us(at)}

    def _busy(self) -> Iterator[tuple[_Transfer, list[tuple[int, int]]]]:
        """Give every transfer with the times that the link was busy with it.

        A log alone says when a transfer was started and when it landed: what was started while another one moved began,
        at the earliest, when that one landed.
        """
        if not any(span.resource == "link" for span in self.spans):
            free = 0
            for transfer in sorted(self.transfers, key=lambda one: (one.ended or 0, one.started)):
                if transfer.ended is not None:
                    begins = min(max(transfer.started, free), transfer.ended)
                    free = transfer.ended
                    yield transfer, [(begins, transfer.ended)]
            return
        moved: dict[int, list[tuple[int, int]]] = {}
        for span in self.spans:
            if span.resource == "link":
                moved.setdefault(span.key, []).append((span.start, span.end))
        for transfer in self.transfers:
            last = float("inf") if transfer.ended is None else transfer.ended
            yield transfer, [busy for busy in moved.get(transfer.key, []) if transfer.started <= busy[0] < last]

    def _counters(self) -> Iterator[dict[str, Any]]:
        """Give the experts that hold a slot, and the transfers asked for that have not landed, whenever they change."""
        changes = [(entry[0], place, entry[1], entry[2]) for place, entry in enumerate(self.log)]
        changes += [(span.start, -1, "asked", span.key) for span in self.spans if span.resource == "queue"]
        resident: set[int] = set()
        waiting: set[int] = set()
        shown: dict[str, int] = {}
        for ns, _, what, key in sorted(changes):
            if what in ("load", "prefetch"):
                resident.add(key)
            if what == "evict":
                resident.discard(key)
            if what in ("asked", *_STARTS):
                waiting.add(key)
            elif what in ("landed", "cancel", "evict"):
                waiting.discard(key)
            for name, count in (("resident experts", len(resident)), ("transfers under way", len(waiting))):
                if self.start <= ns <= self.end and shown.get(name) != count:
                    shown[name] = count
                    yield {"name": name, "ph": "C", "pid": self.process, "ts": self._us(ns), "args": {name: count}}

    def _event(self, event: int) -> str:
        return f"step {event // self.layers}, layer {event % self.layers}"

    def _place(self, key: int) -> dict[str, int]:
        return {"layer": key // self.experts, "expert": key % self.experts}

    def _expert(self, key: int) -> str:
        return f"layer {key // self.experts}, expert {key % self.experts}"

    def _us(self, ns: int) -> float:
        return (ns - self.start) / 1000  # relative to the start: a double keeps the nanoseconds

    def _slice(
        self, track: int, name: str, start: int, end: int, about: Mapping[str, Any], category: str = "layer"
    ) -> dict[str, Any]:
        place = {"pid": self.process, "tid": track, "ts": self._us(start), "dur": (end - start) / 1000}
        return {"name": name, "cat": category, "ph": "X", **place, "args": dict(about)}

    def _about(self, what: str, track: int, args: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": self.process, "tid": track, "args": dict(args)}


def _transfers(log: Iterable[Sequence[Any]]) -> Iterator[_Transfer]:
    """Give every transfer that a log started, with when it ended and what became of it."""
    moving: dict[int, _Transfer] = {}
    unused: dict[int, _Transfer] = {}
    found: list[_Transfer] = []
    for ns, what, key, event in log:
        if what in _STARTS:
            moving[key] = transfer = _Transfer(_STARTS[what], key, ns, event)
            found.append(transfer)
            if what == "prefetch":
                unused[key] = transfer
        elif what in ("hit", "late_hit") and key in unused:
            transfer = unused.pop(key)
            transfer.outcome, transfer.used_in = ("useful" if what == "hit" else "late"), event
        elif what in ("landed", "cancel", "evict"):
            if key in moving:
                transfer = moving.pop(key)
                transfer.ended = ns
                if what != "landed":
                    transfer.outcome = "cancelled"
            if what == "evict":
                unused.pop(key, None)
    yield from found
