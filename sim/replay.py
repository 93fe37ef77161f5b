"""Untimed replay: hits and misses of an eviction policy, without link, clock or prefetch.

Event-atomic, after arXiv 2608.07911: hits are judged when the event starts, nothing that the event needs leaves
before the event ends, and an event that needs more experts than there are slots overflows until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Future, Ints, Setting
from policies.residency import FREE, HELD, Residency
from sim.events import Events


class Misses(NamedTuple):
    """What a replay counted."""

    accesses: int
    hits: int
    misses: int


def replay(eviction: Any, setting: Setting, events: Events, engine: str = "auto") -> Misses:
    """Run `events` through a freshly built `eviction` policy at the slots that `setting` gives.

    Pass ``one_key_events(events)`` for the sequential replay of older papers. `engine` is ``auto``, ``fast`` (compiled) or
    ``reference`` (this file's Python, which also runs policies that cannot be compiled): the same misses.
    """
    misses = None
    if engine != "reference":
        from sim.fast.replay import fast_misses

        misses = fast_misses(eviction, setting, events)
    if misses is None:
        misses = _replay_in_python(eviction, setting, events)
    return Misses(len(events.keys), len(events.keys) - misses, misses)


def _replay_in_python(eviction: Any, setting: Setting, events: Events) -> int:
    residency = Residency(eviction, setting)
    eviction = residency.eviction
    pool_of = residency.pool_of_key
    keys, offsets = events.keys.tolist(), events.offsets.tolist()
    misses = 0
    for now in range(events.total):
        union = keys[offsets[now] : offsets[now + 1]]
        absent = []
        for key in union:
            if key in residency:
                residency.holds[key] = HELD
                eviction.on_hit(key, pool_of[key], now)
            else:
                absent.append(key)
        misses += len(absent)
        for key in absent:
            residency.on_miss(key, pool_of[key], now)
        for key in absent:
            pool = pool_of[key]
            if residency.is_full(pool) and (leaving := residency.victim(pool, now)) >= 0:
                residency.evict(leaving, now)
            residency.insert(key, now)
        residency.hold(union, FREE)
        _shrink(residency, {pool_of[key]: None for key in absent}, now)
    return misses


def _shrink(residency: Residency, pools: Iterable[int], now: int) -> None:
    """Decide retention at the end of an event that overflowed its pools."""
    for pool in pools:
        while len(residency.residents[pool]) > residency.capacity[pool]:
            residency.evict(residency.victim(pool, now), now)


def one_pool(events: Events, slots: int, future: Future | None = None, seed: int = 0) -> Setting:
    """Return the setting of one global pool of `slots` slots, with no times: what curves and tests replay at."""
    return _setting(events, np.zeros(events.layers, np.int64), np.array([slots]), future, seed)


def pool_per_layer(events: Events, slots: int, future: Future | None = None, seed: int = 0) -> Setting:
    """Return the setting of one pool of `slots` slots for every layer."""
    return _setting(events, np.arange(events.layers), np.full(events.layers, slots), future, seed)


def _setting(events: Events, pool_of: Ints, capacity: Ints, future: Future | None, seed: int) -> Setting:
    return Setting(
        layers=events.layers,
        experts=events.experts,
        top_k=int(np.diff(events.offsets).max(initial=1)),
        pool_of=pool_of,
        capacity=capacity,
        seed=seed,
        layer_ns=0,
        transfer_ns=0,
        future=future,
    )
