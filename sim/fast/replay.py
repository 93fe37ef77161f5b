"""Untimed replay as a compiled loop: what `sim.replay` says, some twenty times as fast as libCacheSim's Python binding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Setting
from policies.residency import FREE, HELD, ContractError, no_victim
from sim.events import Events
from sim.fast.members import insert, make_members, remove, touch, victim
from sim.fast.native import FAILED, checked_bounds, compiled, entry, make_known, not_compiled, run_entry, size_of, store
from sim.fast.run import PolicyRaised

WRONG = -1
"""What a replay returns, less the key, when a policy chose somebody who may not leave."""


class Slots(NamedTuple):
    """Who holds the slots, and what is to be replayed."""

    resident: Any
    """[keys] bool."""
    holds: Any
    """[keys] int8."""
    pool_of: Any
    """[keys]"""
    capacity: Any
    """[pools]"""
    taken: Any
    """[pools]"""
    absent: Any
    """[most of an event] keys that the running event misses."""
    offsets: Any
    keys: Any


def fast_misses(policy: Any, setting: Setting, events: Events) -> int | None:
    """Return how many accesses of `events` miss under a freshly built `policy`, or None where numba cannot compile it.

    Raises PolicyRaised, and ContractError for a victim that is none.
    """
    if not isinstance(policy, tuple) or not len(policy) or type(policy) in not_compiled:
        return None
    most = int(np.diff(events.offsets).max(initial=1))
    slots = Slots(
        np.zeros(setting.keys, np.bool_),
        np.zeros(setting.keys, np.int8),
        np.repeat(setting.pool_of, setting.experts),
        setting.capacity,
        np.zeros(setting.pools, np.int64),
        np.zeros(most, np.int64),
        events.offsets,
        events.keys,
    )
    state = (policy, slots, make_members(setting, policy, extra=most))
    memory, table = np.zeros(2048, np.int64), np.zeros(1, np.int64)
    try:
        binding = compiled(bind_replay, make_known(type(policy)))
        with checked_bounds(type(policy)):
            if not binding(state, memory.ctypes.data, memory.nbytes, table):
                return None
    except Exception:  # numba has many ways to say that it cannot; tests make sure that it can all of ours
        not_compiled.add(type(policy))
        return None
    misses = int(compiled(run_entry)(table[0], memory.ctypes.data))
    if misses == FAILED:
        raise PolicyRaised("a compiled policy raised an exception; replay with engine='reference' shows which")
    if misses < 0:
        raise ContractError(no_victim(type(policy).__name__, WRONG - misses - 1))
    return misses


def replay(state: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Replay all events and return the misses."""
    policy, slots, members = state
    misses = 0
    for now in range(len(slots.offsets) - 1):
        start, stop = slots.offsets[now], slots.offsets[now + 1]
        absent = 0
        for access in range(start, stop):
            key = slots.keys[access]
            if slots.resident[key]:
                policy.on_hit(key, slots.pool_of[key], now)
                touch(policy, members, key, slots.pool_of[key], now)
            else:
                slots.absent[absent] = key
                absent += 1
        if absent == 0:
            continue
        misses += absent
        for access in range(start, stop):
            slots.holds[slots.keys[access]] = HELD
        for index in range(absent):
            policy.on_miss(slots.absent[index], slots.pool_of[slots.absent[index]], now)
        for index in range(absent):
            key = slots.absent[index]
            pool = slots.pool_of[key]
            if slots.taken[pool] >= slots.capacity[pool]:
                leaving = victim(policy, members, slots.holds, pool, HELD, now)
                if leaving >= 0:
                    if leaving >= len(slots.holds) or not slots.resident[leaving] or slots.holds[leaving] >= HELD:
                        return WRONG - leaving - 1
                    slots.resident[leaving] = False
                    slots.taken[pool] -= 1
                    remove(policy, members, leaving, pool, now)
                    policy.on_evict(leaving, pool, now)
            slots.resident[key] = True
            slots.taken[pool] += 1
            policy.on_insert(key, pool, now)
            insert(policy, members, key, pool, now)
        for access in range(start, stop):
            slots.holds[slots.keys[access]] = FREE
        for index in range(absent):  # an event that overflowed its pool decides retention at its end
            pool = slots.pool_of[slots.absent[index]]
            while slots.taken[pool] > slots.capacity[pool]:
                leaving = victim(policy, members, slots.holds, pool, HELD, now)
                if leaving < 0 or leaving >= len(slots.holds) or not slots.resident[leaving]:
                    return WRONG - max(leaving, -1) - 1
                slots.resident[leaving] = False
                slots.taken[pool] -= 1
                remove(policy, members, leaving, pool, now)
                policy.on_evict(leaving, pool, now)
    return misses


_replay = entry(replay)


def bind_replay(state: Any, memory: Any, size: Any, table: Any) -> Any:
    """Put `state` into `memory` and the address of the loop into `table`; return whether there was room."""
    if size < size_of(state):
        return False
    store(memory, state)
    table[0] = _replay(state)
    return True
