"""What a run logs, if it keeps a log: a run without one is compiled apart, so that not logging costs nothing."""

from __future__ import annotations

from typing import Any

from sim.fast.native import overloaded
from sim.fast.state import INT32, INT64, LOG, NONE, expert_of, number, record

EVENTS = ("hit", "late_hit", "miss", "load", "prefetch", "refresh", "landed", "cancel", "evict", "end")
"""Names of what is logged, by number."""
HIT, LATE_HIT, MISS, LOADS, PREFETCHES, REFRESH, LANDED, CANCEL, EVICT, ENDS = range(len(EVENTS))


@overloaded
def log_is_full(run: Any) -> Any:
    """Return whether the log may lack room for what one event writes."""
    return _is_full if _keeps_log(run) else lambda run: False


@overloaded
def note(run: Any, ns: Any, what: Any, key: Any) -> Any:
    """Log that `what` happened to `key` at `ns`."""
    return _note if _keeps_log(run) else lambda run, ns, what, key: None


@overloaded
def note_judged(run: Any, hits: Any, awaited: Any, absent: Any) -> Any:
    """Log how the experts of an event were found: as many hits, of which some are awaited, and misses."""
    return _note_judged if _keeps_log(run) else lambda run, hits, awaited, absent: None


@overloaded
def note_train(run: Any) -> Any:
    """Log when each of the waiting demands landed."""
    return _note_train if _keeps_log(run) else lambda run: None


def _keeps_log(run: Any) -> bool:
    """Tell by its type whether a run keeps a log (`sim.fast.state.LOGGED_RUN`)."""
    return "log_at" in run.fields


def _is_full(run: Any) -> Any:
    return run.logged + 4 * run.keys + 2 * run.experts + 8 > run.log_room


def _note(run: Any, ns: Any, what: Any, key: Any) -> None:
    entry = record(run.log_at, run.logged, LOG)
    entry.ns, entry.what, entry.key, entry.event = ns, what, key, run.now
    run.logged += 1


def _note_judged(run: Any, hits: Any, awaited: Any, absent: Any) -> None:
    for index in range(hits):
        key = number(run.hits_at, index, INT32)
        if expert_of(run, key).transfer == NONE:
            note(run, run.time, HIT, key)
    for index in range(awaited):
        note(run, run.time, LATE_HIT, number(run.demands_at, index, INT32))
    for index in range(absent):
        note(run, run.time, MISS, number(run.misses_at, index, INT32))


def _note_train(run: Any) -> None:
    for index in range(run.demands):
        note(run, number(run.landed_at, index, INT64), LANDED, number(run.demands_at, index, INT32))
