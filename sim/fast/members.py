"""Who is resident, for policies that score: the lowest score leaves, of equals the one that took its slot first.

Residents stand in blocks, with their scores and stamps beside one another, so that the lowest of a block is found many at a
time; it is remembered until one of the block changes. Residents that may not leave although they score lowest are parked:
taken out of sight until they may. A policy that is not `steady` (policies.contract) is asked anew each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from policies.contract import Setting
from sim.fast.native import overloaded
from traces.errors import InputError

BLOCK = 32
"""Residents of a block."""

KEY_BITS = 24
"""Of a stamp; the rest is the running number of the insertion, so that comparing stamps compares those."""

ABSENT = np.iinfo(np.int64).max
"""Score and stamp of a place where nobody stands, or whose resident is parked: above those of all others."""


class Members(NamedTuple):
    """The residents of all pools; every pool begins with a block of its own."""

    keys: Any
    """[blocks, BLOCK] int32: who stands where."""
    score: Any
    """[blocks, BLOCK] their scores, as whole numbers in the same order."""
    stamp: Any
    """[blocks, BLOCK] their stamps: number of the insertion and key."""
    place: Any
    """[keys] int32: where a key stands, -1 for nowhere."""
    came: Any
    """[keys] its stamp, parked or not."""
    first: Any
    """[pools] place at which each pool begins."""
    count: Any
    """[pools] residents of each pool."""
    best_score: Any
    """[blocks] the lowest score of each block."""
    best_stamp: Any
    """[blocks] and, of those who have it, the lowest stamp."""
    stale: Any
    """[blocks] bool: whether both must be found anew."""
    parked: Any
    """[keys] int32: a list of the parked."""
    counts: Any
    """[2] insertions so far, and the length of `parked`."""
    steady: bool
    """Whether scores stay what they are until the policy is told of an expert."""
    changed: Any
    """[1] the policy's own count of exceptions to that."""
    known: Any
    """[1] that count as of the last look."""


INSERTED, PARKED = range(2)
"""Places in `Members.counts`."""


def make_members(setting: Setting, policy: Any, extra: int = 0) -> Members | None:
    """Return empty pools for a policy that scores, or None for one that chooses; `extra` residents may overflow a pool."""
    if hasattr(policy, "victim"):
        return None
    if setting.keys >= 1 << KEY_BITS:
        raise InputError(f"{setting.keys:,} experts are too many for a policy that scores: the limit is {1 << KEY_BITS:,}")
    declared = next(vars(cls).get("STEADY") for cls in type(policy).__mro__ if "score" in vars(cls))
    blocks_of_pool = -(-(setting.capacity + extra) // BLOCK)
    first = np.concatenate([[0], np.cumsum(blocks_of_pool)])
    blocks = first[-1]
    return Members(
        keys=np.zeros((blocks, BLOCK), np.int32),
        score=np.full((blocks, BLOCK), ABSENT),
        stamp=np.full((blocks, BLOCK), ABSENT),
        place=np.full(setting.keys, -1, np.int32),
        came=np.zeros(setting.keys, np.int64),
        first=first[:-1] * BLOCK,
        count=np.zeros(setting.pools, np.int64),
        best_score=np.full(blocks, ABSENT),
        best_stamp=np.full(blocks, ABSENT),
        stale=np.zeros(blocks, np.bool_),
        parked=np.zeros(setting.keys, np.int32),
        counts=np.zeros(2, np.int64),
        steady=declared is not None,  # by the class whose score it is, not by one that it inherits from
        changed=getattr(policy, declared) if declared else np.zeros(1, np.int64),
        known=np.zeros(1, np.int64),
    )


@overloaded
def victim(policy: Any, members: Any, holds: Any, pool: Any, limit: Any, now: Any) -> Any:
    """Return who leaves `pool` of those held below `limit`, or -1: whom the policy chooses, or who scores lowest."""
    if isinstance(members, types.NoneType):
        return lambda policy, members, holds, pool, limit, now: policy.victim(pool, holds, limit, now)
    return _lowest


@overloaded
def insert(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> Any:
    """Add `key`, of which the policy was told, to the residents of `pool`."""
    return _nothing if isinstance(members, types.NoneType) else _insert


@overloaded
def remove(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> Any:
    """Take `key` out of the residents of `pool`."""
    return _nothing if isinstance(members, types.NoneType) else _remove


@overloaded
def touch(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> Any:
    """Note that the policy was told of a resident of `pool`."""
    return _nothing if isinstance(members, types.NoneType) else _touch


def _nothing(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    """Policies that choose their victims need no list of residents."""


def _insert(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    place = members.first[pool] + members.count[pool]
    members.count[pool] += 1
    members.counts[INSERTED] += 1
    members.came[key] = members.counts[INSERTED] << KEY_BITS | key
    members.place[key] = place
    members.keys[place // BLOCK, place % BLOCK] = key
    if members.steady:
        _show(policy, members, key, now)
    else:  # asked for when a victim is looked for, and no sooner
        members.stamp[place // BLOCK, place % BLOCK] = members.came[key]


def _remove(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    members.count[pool] -= 1
    last = members.first[pool] + members.count[pool]
    place = members.place[key]
    block, row = place // BLOCK, place % BLOCK
    last_block, last_row = last // BLOCK, last % BLOCK
    moved, score, stamp = (
        members.keys[last_block, last_row],
        members.score[last_block, last_row],
        members.stamp[last_block, last_row],
    )
    members.keys[block, row], members.score[block, row], members.stamp[block, row] = moved, score, stamp
    members.place[moved] = place
    members.place[key] = -1
    members.score[last_block, last_row] = members.stamp[last_block, last_row] = ABSENT
    members.stale[block] = True
    if members.best_stamp[last_block] == stamp:
        members.stale[last_block] = True


def _touch(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    place = members.place[key]
    if members.steady and members.stamp[place // BLOCK, place % BLOCK] != ABSENT:
        _show(policy, members, key, now)


@njit(forceinline=True)
def _show(policy: Any, members: Any, key: Any, now: Any) -> None:
    """Let the resident `key` be seen where it stands, with its present score."""
    place = members.place[key]
    block, row = place // BLOCK, place % BLOCK
    stamp, score = members.came[key], in_order(policy.score(key, now))
    members.score[block, row], members.stamp[block, row] = score, stamp
    best = members.best_score[block]
    if score < best or (score == best and stamp < members.best_stamp[block]):
        members.best_score[block], members.best_stamp[block] = score, stamp
    elif members.best_stamp[block] == stamp:
        members.stale[block] = True


def _lowest(policy: Any, members: Any, holds: Any, pool: Any, limit: Any, now: Any) -> Any:
    if members.known[0] != members.changed[0] or not members.steady:
        members.known[0] = members.changed[0]
        _ask_all(policy, members, holds, limit, now)
    if members.counts[PARKED]:
        _bring_back(policy, members, holds, limit, now)
    first = members.first[pool] // BLOCK
    stop = first + (members.count[pool] + BLOCK - 1) // BLOCK
    best_scores, best_stamps = members.best_score[first:stop], members.best_stamp[first:stop]
    stale = members.stale[first:stop]
    for block in range(len(stale)):
        if stale[block]:
            stale[block] = False
            best_scores[block], best_stamps[block] = _best_of(members.score[first + block], members.stamp[first + block])
    while True:
        _, stamp = _best_of(best_scores, best_stamps)
        if stamp >= ABSENT - 1:
            return -1
        key = stamp & ((1 << KEY_BITS) - 1)
        if holds[key] < limit:
            return key
        _park(members, key)


@njit(forceinline=True)
def _best_of(scores: Any, stamps: Any) -> Any:
    """Return the lowest score and the lowest stamp of those who have it: no branches, so that vector instructions can."""
    lowest = found = ABSENT
    for index in range(len(scores)):
        lowest = min(lowest, scores[index])
    for index in range(len(stamps)):
        stamp = stamps[index]
        # Not ABSENT: then the compiler would see that nothing needs to be done for these, and branch.
        found = min(found, stamp if scores[index] == lowest else ABSENT - 1)
    return lowest, found


@njit(forceinline=True)
def _park(members: Any, key: Any) -> None:
    """Take a resident that may not leave out of sight."""
    block, row = members.place[key] // BLOCK, members.place[key] % BLOCK
    members.score[block, row] = members.stamp[block, row] = ABSENT
    members.parked[members.counts[PARKED]] = key
    members.counts[PARKED] += 1
    members.best_score[block], members.best_stamp[block] = _best_of(members.score[block], members.stamp[block])


@njit(forceinline=True)
def _bring_back(policy: Any, members: Any, holds: Any, limit: Any, now: Any) -> None:
    """Let the parked that may leave be seen again, and forget those that are gone."""
    still = 0
    for index in range(members.counts[PARKED]):
        key = members.parked[index]
        place = members.place[key]
        if place < 0 or members.stamp[place // BLOCK, place % BLOCK] != ABSENT:
            continue  # it left; it may have come again since
        if holds[key] < limit:
            _show(policy, members, key, now)
        else:
            members.parked[still] = key
            still += 1
    members.counts[PARKED] = still


@njit(forceinline=True)
def _ask_all(policy: Any, members: Any, holds: Any, limit: Any, now: Any) -> None:
    """Ask the policy for the score of every resident that is not parked; where it will be asked again, not of those held."""
    for pool in range(len(members.first)):
        for place in range(members.first[pool], members.first[pool] + members.count[pool]):
            block, row = place // BLOCK, place % BLOCK
            if members.stamp[block, row] != ABSENT:
                key = members.keys[block, row]
                asked = members.steady or holds[key] < limit
                members.score[block, row] = in_order(policy.score(key, now)) if asked else ABSENT
    members.stale[:] = True


@overloaded
def in_order(score: Any) -> Any:
    """Return a whole number that compares with others as `score` does; no number at all leaves first, as for NumPy."""
    return _float_in_order if isinstance(score, types.Float) else lambda score: np.int64(score)


def _float_in_order(score: Any) -> Any:
    bits = np.float64(score + 0.0).view(np.int64)  # -0.0 and 0.0 are equal
    if score != score:
        return np.iinfo(np.int64).min
    return bits if bits >= 0 else bits ^ np.iinfo(np.int64).max
