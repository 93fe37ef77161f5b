"""Untimed replay as a compiled loop: what `sim.replay` says, hundreds of times as fast."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from policies.contract import Setting
from policies.residency import FREE, HELD, ContractError, no_victim
from sim.events import Events
from sim.fast.members import insert, make_members, remove, touch, victim
from sim.fast.native import FAILED, NUMBER, bind, compiled, entry, keep, not_compiled, run_entry
from sim.fast.run import PolicyRaised
from sim.fast.unions import longest

WRONG = -1
"""Nobody was chosen."""
NOBODY = -2
"""What a replay returns when nobody was chosen although somebody must leave; less 1 and the key, when a wrong one was."""


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
    most = max(compiled(longest)(events.offsets), 1)
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
    table = np.zeros(2, np.int64)
    state = (policy, slots, make_members(setting, policy, extra=most))
    try:
        memory = bind(bind_replay, type(policy), state, table)
    except Exception:  # numba has many ways to say that it cannot; tests make sure that it can all of ours
        not_compiled.add(type(policy))
        return None
    single = most == 1 and setting.pools == 1 and len(events.keys) == events.total and setting.capacity[0] > 0
    misses = int(compiled(run_entry)(table[int(single)], memory.ctypes.data))
    del state  # no sooner: the loop had the addresses of its arrays only
    if misses == FAILED:
        raise PolicyRaised("a compiled policy raised an exception; replay with engine='reference' shows which")
    if misses < 0:
        raise ContractError(no_victim(type(policy).__name__, NOBODY - 1 - misses))
    return misses


def replay(state: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Replay all events and return the misses."""
    policy, slots, members = state
    misses = 0
    for now in range(len(slots.offsets) - 1):
        start, stop = slots.offsets[now], slots.offsets[now + 1]
        absent = 0
        for access in range(start, stop):
            key = slots.keys[access] & NUMBER
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
            key = slots.absent[index] & NUMBER
            pool = slots.pool_of[key] & NUMBER
            if slots.taken[pool] >= slots.capacity[pool]:
                leaving = _let_one_leave(policy, slots, members, pool, now)
                if leaving < WRONG:
                    return leaving
            slots.resident[key] = True
            slots.taken[pool] += 1
            policy.on_insert(key, pool, now)
            insert(policy, members, key, pool, now)
        for access in range(start, stop):
            slots.holds[slots.keys[access]] = FREE
        for index in range(absent):  # an event that overflowed its pool decides retention at its end
            pool = slots.pool_of[slots.absent[index]]
            while slots.taken[pool] > slots.capacity[pool]:
                leaving = _let_one_leave(policy, slots, members, pool, now)
                if leaving < 0:
                    return min(leaving, NOBODY)
    return misses


def replay_single(state: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Replay events of one key each from one pool: what `replay` does, without what such events cannot need."""
    policy, slots, members = state
    misses = 0
    taken, capacity = 0, slots.capacity[0]
    for now in range(len(slots.keys)):
        key = slots.keys[now] & NUMBER
        if slots.resident[key]:
            policy.on_hit(key, 0, now)
            touch(policy, members, key, 0, now)
            continue
        misses += 1
        policy.on_miss(key, 0, now)
        if taken == capacity:
            leaving = _let_one_leave(policy, slots, members, 0, now)
            if leaving < 0:
                return min(leaving, NOBODY)
            taken -= 1
        slots.resident[key] = True
        taken += 1
        policy.on_insert(key, 0, now)
        insert(policy, members, key, 0, now)
    return misses


@njit(forceinline=True)
def _let_one_leave(policy: Any, slots: Any, members: Any, pool: Any, now: Any) -> Any:
    """Evict whom the policy chooses and return it; WRONG if it chose nobody, and below that who may not leave."""
    leaving = victim(policy, members, slots.holds, pool, HELD, now)
    if leaving < 0:
        return WRONG
    if leaving >= len(slots.holds) or slots.pool_of[leaving] != pool:
        return NOBODY - 1 - leaving
    if not slots.resident[leaving] or slots.holds[leaving] >= HELD:
        return NOBODY - 1 - leaving
    slots.resident[leaving] = False
    slots.taken[pool] -= 1
    remove(policy, members, leaving, pool, now)
    policy.on_evict(leaving, pool, now)
    return leaving


_replay, _replay_single = entry(replay), entry(replay_single)


def bind_replay(state: Any, memory: Any, size: Any, table: Any) -> Any:
    """Put `state` into `memory` and the address of the loop into `table`; return whether there was room."""
    if not keep(state, memory, size):
        return False
    table[0], table[1] = _replay(state), _replay_single(state)
    return True
