"""Which experts hold the slots of the device: the bookkeeping that both engines and the executor share.

A slot is taken when a load starts, not when it ends. Who leaves is the eviction policy's choice among the
experts that may leave; what may leave is decided here, by how firmly each expert is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from policies.contract import Setting
from policies.order import with_lists
from traces.errors import InputError

FREE, AWAITED, HELD = 0, 1, 2
"""How firmly a resident is held: it may leave; it was prefetched and its event is still to come; it is in flight or
the current event needs it."""


class ContractError(InputError):
    """A policy decided what the contract does not allow."""


def no_victim(policy: str, key: int) -> str:
    """Say that an eviction policy chose `key`, which it must not, or nobody (-1) where it must choose."""
    if key < 0:
        return f"eviction policy {policy} names no victim (-1), though not every resident is held"
    return f"eviction policy {policy} chose expert key {key}: a victim must be a resident with holds[key] < limit, or -1"


def no_prediction(policy: str, found: int, experts: int) -> str:
    """Say that a predictor, or the prefetch rule that took of it, gave an id or a count that cannot be."""
    return (
        f"predictor {policy} or its prefetch rule gave {found}: ids are those of {experts} experts, counts at most what "
        "was asked for"
    )


class Residency:
    """Slots, pools and their residents, with every change reported to the eviction policy."""

    def __init__(self, eviction: Any, setting: Setting) -> None:
        self.eviction = eviction = with_lists(eviction)
        self.pool_of_key = np.repeat(setting.pool_of, setting.experts).tolist()
        """Pool of every key, by key."""
        self.capacity: list[int] = setting.capacity.tolist()
        """Slots of every pool."""
        self.residents: list[dict[int, None]] = [{} for _ in self.capacity]
        """Keys that hold a slot, by pool, in the order in which they took it."""
        self.holds = [FREE] * setting.keys
        """How firmly every key is held: FREE, AWAITED or HELD; meaningless for keys without a slot."""
        self.on_miss = getattr(eviction, "on_miss", _nothing)
        self._victim = eviction.victim if hasattr(eviction, "victim") else self._lowest_score

    def __contains__(self, key: int) -> bool:
        return key in self.residents[self.pool_of_key[key]]

    def hold(self, keys: Iterable[int], how: int) -> None:
        """Hold all `keys` as firmly as `how` says."""
        holds = self.holds
        for key in keys:
            holds[key] = how

    def victim(self, pool: int, now: int, limit: int = HELD) -> int:
        """Return the key that `pool` gives up, or -1 where every resident is held at `limit` or above.

        Raises ContractError where the policy chose another.
        """
        victim: int = self._victim(pool, self.holds, limit, now)
        if victim >= 0 and (victim not in self.residents[pool] or self.holds[victim] >= limit):
            raise ContractError(no_victim(type(self.eviction).__name__, victim))
        return victim

    def evict(self, key: int, now: int) -> None:
        """Take the slot of `key` away."""
        pool = self.pool_of_key[key]
        del self.residents[pool][key]
        self.eviction.on_evict(key, pool, now)

    def insert(self, key: int, now: int, hold: int = HELD) -> None:
        """Give `key` a slot; its pool may overflow (untimed replay), the caller sees to that."""
        pool = self.pool_of_key[key]
        self.holds[key] = hold
        self.residents[pool][key] = None
        self.eviction.on_insert(key, pool, now)

    def is_full(self, pool: int) -> bool:
        """Whether `pool` has no slot to give."""
        return len(self.residents[pool]) >= self.capacity[pool]

    def _lowest_score(self, pool: int, holds: Any, limit: int, now: int) -> int:
        """Choose for a policy that scores: the lowest leaves, of equals the one that took its slot first."""
        candidates = [key for key in self.residents[pool] if holds[key] < limit]
        if not candidates:
            return -1
        return candidates[int(np.argmin(self.eviction.score(np.array(candidates), now)))]


def _nothing(key: int, pool: int, now: int) -> None:
    """Stand in for an optional method that a policy does not have."""
