"""S3-FIFO: a small queue on probation, a main queue, and a ghost list."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints, Setting
from policies.order import Queues, enter, leave, make_queues, oldest_free, renew, shorten


class S3FIFO(NamedTuple):
    """Try new experts in a small queue; keep those used again in a main queue with second chances.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1, in the
    present form of libCacheSim: before the first eviction, newcomers that find the small queue full enter
    the main queue. An unused prefetch leaves no ghost; one that returns from the ghost list enters the
    main queue.

    Parameters, as shares of a pool's slots: `small`, the small queue (at least one slot), and `ghosts`,
    the ghost list. `promote_at`: uses after the first that move an expert from small to main.
    """

    order: Queues
    """Of pool p: queue 3p is small, 3p + 1 main, 3p + 2 the ghost list."""
    again: Ints
    """[keys] uses after the first, at most 3; -1 before the first (prefetched or absent)."""
    returning: Ints
    """[keys] 1 for a missing key that was in the ghost list."""
    full: Ints
    """[pools] 1 once the pool has evicted."""
    small_size: Ints
    """[pools]"""
    main_size: Ints
    """[pools]"""
    ghost_size: Ints
    """[pools]"""
    promote_at: int

    @classmethod
    def build(cls, setting: Setting, small: float = 0.1, ghosts: float = 0.9, promote_at: int = 2) -> S3FIFO:
        """Start with empty queues."""
        small_size = np.maximum((setting.capacity * small).astype(np.int64), 1)
        return cls(
            make_queues(setting.keys, 3 * setting.pools),
            np.full(setting.keys, -1),
            np.zeros(setting.keys, np.int64),
            np.zeros(setting.pools, np.int64),
            small_size,
            setting.capacity - small_size,
            (setting.capacity * ghosts).astype(np.int64),
            promote_at,
        )

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.again[key] = 0
        if self.order.queue[key] == 3 * pool + 2:
            leave(self.order, key)
            self.returning[key] = 1

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        small = 3 * pool
        if self.order.queue[key] == small + 2:  # prefetched: no miss took it off the ghost list
            leave(self.order, key)
            self.returning[key] = 1
        fills_main = self.full[pool] == 0 and self.order.length[small] >= self.small_size[pool]
        enter(self.order, small + 1 if self.returning[key] == 1 or fills_main else small, key)
        self.returning[key] = 0

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.again[key] = min(self.again[key] + 1, 3)

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        was_small = self.order.queue[key] == 3 * pool
        leave(self.order, key)
        if was_small and self.again[key] >= 0:
            enter(self.order, 3 * pool + 2, key)
            shorten(self.order, 3 * pool + 2, self.ghost_size[pool])
        self.again[key] = -1
        self.full[pool] = 1

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        small, main = 3 * pool, 3 * pool + 1
        key = oldest_free(self.order, small, holds, limit)
        if self.order.length[main] <= self.main_size[pool] or oldest_free(self.order, main, holds, limit) < 0:
            while key >= 0:
                if self.again[key] < self.promote_at:
                    return key
                leave(self.order, key)
                enter(self.order, main, key)
                self.again[key] = 0
                key = oldest_free(self.order, small, holds, limit)
        key = oldest_free(self.order, main, holds, limit)
        while key >= 0 and self.again[key] > 0:
            self.again[key] -= 1
            renew(self.order, main, key)
            key = oldest_free(self.order, main, holds, limit)
        return key
