"""Who is resident, for policies that score: the lowest score leaves, of equals the one that took its slot first.

Residents stand in blocks. The lowest score of each block is remembered, so that a victim costs a look at every block and not
at every resident. A policy that is not `steady` (policies.contract) is looked at anew each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from policies.contract import Setting
from sim.fast.native import overloaded

BLOCK = 16
"""Residents of a block."""
NO_LIMIT = 127
"""Above every hold."""


class Members(NamedTuple):
    """The residents of all pools; every pool begins with a block of its own."""

    keys: Any
    """[places] int32: who stands where."""
    place: Any
    """[keys] int32: where a key stands, -1 for nowhere."""
    came: Any
    """[keys]: running number of the insertion, for ties."""
    first: Any
    """[pools] place at which each pool begins."""
    count: Any
    """[pools] residents of each pool."""
    best: Any
    """[blocks] int32: the key with the lowest score of each block, -1 for a block without members."""
    score: Any
    """[blocks] its score."""
    stale: Any
    """[blocks] bool: whether both must be found anew."""
    inserted: Any
    """[1] insertions so far."""
    steady: bool
    """Whether scores keep their order until the policy is told of an expert."""
    changed: Any
    """[1] the policy's own count of exceptions to that."""
    known: Any
    """[1] that count as of the last look."""


def make_members(setting: Setting, policy: Any, extra: int = 0) -> Members | None:
    """Return empty pools for a policy that scores, or None for one that chooses; `extra` residents may overflow a pool."""
    if hasattr(policy, "victim"):
        return None
    declared = next(vars(cls).get("STEADY") for cls in type(policy).__mro__ if "score" in vars(cls))
    places = -(-(setting.capacity + extra) // BLOCK) * BLOCK
    first = np.concatenate([[0], np.cumsum(places)])
    blocks = first[-1] // BLOCK
    return Members(
        keys=np.zeros(first[-1], np.int32),
        place=np.full(setting.keys, -1, np.int32),
        came=np.zeros(setting.keys, np.int64),
        first=first[:-1],
        count=np.zeros(setting.pools, np.int64),
        best=np.full(blocks, -1, np.int32),
        score=np.zeros(blocks, np.asarray(policy.score(0, 0)).dtype),
        stale=np.zeros(blocks, np.bool_),
        inserted=np.zeros(1, np.int64),
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
    members.keys[place] = key
    members.place[key] = place
    members.count[pool] += 1
    members.inserted[0] += 1
    members.came[key] = members.inserted[0]
    touch(policy, members, key, pool, now)


def _remove(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    members.count[pool] -= 1
    last = members.first[pool] + members.count[pool]
    place = members.place[key]
    moved = members.keys[last]
    members.keys[place] = moved
    members.place[moved] = place
    members.place[key] = -1
    members.stale[place // BLOCK] = True
    if members.best[last // BLOCK] == moved:
        members.stale[last // BLOCK] = True


def _touch(policy: Any, members: Any, key: Any, pool: Any, now: Any) -> None:
    if not members.steady:
        return
    block = members.place[key] // BLOCK
    if members.stale[block]:
        return
    best = members.best[block]
    score = policy.score(key, now)
    if best == key:
        members.stale[block] = True
    elif (
        best < 0
        or score < members.score[block]
        or (score == members.score[block] and members.came[key] < members.came[best])
    ):
        members.best[block], members.score[block] = key, score


def _lowest(policy: Any, members: Any, holds: Any, pool: Any, limit: Any, now: Any) -> Any:
    start = members.first[pool]
    stop = start + members.count[pool]
    if members.known[0] != members.changed[0] or not members.steady:
        members.known[0] = members.changed[0]
        members.stale[:] = True
    found = -1
    found_score = members.score[0]
    for block in range(start // BLOCK, (stop + BLOCK - 1) // BLOCK):
        if members.stale[block]:
            members.best[block], members.score[block] = _lowest_of_block(policy, members, holds, block, stop, NO_LIMIT, now)
            members.stale[block] = False
        key, score = members.best[block], members.score[block]
        if found >= 0 and (score > found_score or (score == found_score and members.came[key] > members.came[found])):
            continue
        if holds[key] >= limit:
            key, score = _lowest_of_block(policy, members, holds, block, stop, limit, now)
            if key < 0:
                continue
        if found < 0 or score < found_score or (score == found_score and members.came[key] < members.came[found]):
            found, found_score = key, score
    return found


@njit(forceinline=True)
def _lowest_of_block(policy: Any, members: Any, holds: Any, block: Any, stop: Any, limit: Any, now: Any) -> Any:
    found = -1
    found_score = members.score[block]
    for place in range(block * BLOCK, min((block + 1) * BLOCK, stop)):
        key = members.keys[place]
        if holds[key] < limit:
            score = policy.score(key, now)
            if found < 0 or score < found_score or (score == found_score and members.came[key] < members.came[found]):
                found, found_score = key, score
    return found, found_score
