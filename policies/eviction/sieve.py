"""SIEVE: a queue that is never reordered, and a hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints, Setting
from policies.order import Order, append, make_order, oldest, oldest_free, remove


class Sieve(NamedTuple):
    """Sweep a hand from old to new, sparing every expert used again since the hand last passed it.

    Source: Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web
    caches", NSDI 2024, algorithm 1. The hand passes over experts that may not leave and leaves their
    marks alone. No parameters.
    """

    order: Order
    again: Ints
    """[keys] 1: used again since the hand passed; 0: used once; -1: not used yet (prefetched)."""
    hand: Ints
    """[pools] the key at which the next sweep starts; -1 is the oldest."""

    @classmethod
    def build(cls, setting: Setting) -> Sieve:
        """Start with one empty queue per pool."""
        order = make_order(setting.keys, setting.pools)
        return cls(order, np.full(setting.keys, -1), np.full(setting.pools, -1))

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.again[key] = 0

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        append(self.order, pool, key)

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.again[key] = min(self.again[key] + 1, 1)

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        if self.hand[pool] == key:
            newer = self.order.newer[key]
            self.hand[pool] = newer if newer < self.order.keys else -1
        remove(self.order, key)
        self.again[key] = -1

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        if oldest_free(self.order, pool, holds, limit) < 0:
            return -1
        key = int(self.hand[pool])
        if key < 0:
            key = oldest(self.order, pool)
        while holds[key] >= limit or self.again[key] == 1:
            if holds[key] < limit:
                self.again[key] = 0
            key = self.order.newer[key]
            if key >= self.order.keys:
                key = oldest(self.order, pool)
        self.hand[pool] = key
        return key
