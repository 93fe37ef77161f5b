"""Two runs side by side as a Chrome trace, which Perfetto opens."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from real.pricing import JUDGED, STARTS, Log

EVENTS, LINK = 1, 2
"""Threads of a run: events of the model, and transfers."""


def write_chrome_trace(
    path: str | os.PathLike[str], runs: Mapping[str, Log], layers: int, experts: int, steps: range
) -> None:
    """Write `steps` of every log in `runs`, by name, into `path` (.json.gz). Each begins at 0 with its first event."""
    records: list[dict[str, Any]] = []
    for process, (name, log) in enumerate(runs.items(), start=1):
        records.append(_name("process_name", process, 0, name))
        records += [_name("thread_name", process, thread, text) for thread, text in ((EVENTS, "events"), (LINK, "link"))]
        records += _slices(log, process, layers, experts, range(steps.start * layers, steps.stop * layers))
    content = json.dumps({"traceEvents": records, "displayTimeUnit": "ms"}).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(content, mtime=0))


def _slices(log: Log, process: int, layers: int, experts: int, events: range) -> Iterator[dict[str, Any]]:
    """Give a slice for every event, from its start to its end, and for every transfer."""
    inside = [entry for entry in log if entry[3] in events]
    if not inside:
        return
    zero = inside[0][0]
    began: dict[int, int] = {}
    counts: dict[int, dict[str, int]] = {}
    moving: dict[int, tuple[int, str]] = {}
    for ns, what, key, event in inside:
        if what in JUDGED:
            began.setdefault(event, ns)
            counts.setdefault(event, dict.fromkeys(JUDGED, 0))[what] += 1
        elif what == "end" and event in began:
            name = f"step {event // layers}, layer {event % layers}"
            yield _slice(name, process, EVENTS, began[event] - zero, ns - began[event], counts[event])
        elif what in STARTS:
            moving[key] = (ns, what)
        elif what in ("landed", "cancel") and key in moving:
            start, kind = moving.pop(key)
            where = {"layer": key // experts, "expert": key % experts, "outcome": what}
            yield _slice(kind, process, LINK, start - zero, ns - start, where)


def _slice(name: str, process: int, thread: int, start: int, length: int, what: Mapping[str, Any]) -> dict[str, Any]:
    place = {"pid": process, "tid": thread, "ts": start / 1000, "dur": length / 1000}  # microseconds
    return {"name": name, "ph": "X", **place, "args": dict(what)}


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
