"""ARC as Fate's released code has it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints, Setting
from policies.order import NOWHERE, Queues, enter, leave, make_queues, oldest_free, shorten


class FateARC(NamedTuple):
    """ARC with coarser steps, which prefetches do not touch.

    Source: Fate, arXiv 2502.12224, expert_ARC_cache.py of its released code. Against
    `policies.eviction.arc.ARC`: a ghost's return moves the target by the whole length of T1 or T2, and
    the case "returns from B2 while T1 is exactly at its target" is absent. A prefetched expert stands
    outside the lists until its first use, leaves before all others, and then leaves no ghost. Left out:
    the code's warm start with experts 0 to C - 1, which is an allocation's choice. No parameters.
    """

    resident: Queues
    """Of pool p: queue 3p is T1, 3p + 1 is T2, 3p + 2 holds prefetched experts not used yet."""
    ghost: Queues
    """Of pool p: queue 2p is B1, 2p + 1 is B2."""
    target: Ints
    """[pools] slots that T1 should have."""
    capacity: Ints
    """[pools] slots."""
    missed: Ints
    """[keys] 1 + list (T1, T2) that a missing key will enter; 0 for keys that nothing has asked for."""

    @classmethod
    def build(cls, setting: Setting) -> FateARC:
        """Start with empty lists and the target at 0."""
        return cls(
            make_queues(setting.keys, 3 * setting.pools),
            make_queues(setting.keys, 2 * setting.pools),
            np.zeros(setting.pools, np.int64),
            setting.capacity.astype(np.int64),
            np.zeros(setting.keys, np.int64),
        )

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        t1, t2 = self.resident.length[3 * pool], self.resident.length[3 * pool + 1]
        self.missed[key] = 1
        if self.ghost.queue[key] != NOWHERE:
            step = t1 if self.ghost.queue[key] == 2 * pool else -t2
            self.target[pool] = min(max(self.target[pool] + step, 0), self.capacity[pool])
            leave(self.ghost, key)
            self.missed[key] = 2

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        enter(self.resident, 3 * pool + (self.missed[key] + 2) % 3, key)
        self.missed[key] = 0
        t1, t2 = self.resident.length[3 * pool], self.resident.length[3 * pool + 1]
        shorten(self.ghost, 2 * pool, self.capacity[pool] - t1)
        shorten(self.ghost, 2 * pool + 1, 2 * self.capacity[pool] - t1 - t2 - self.ghost.length[2 * pool])

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        t1, t2 = self.resident.length[3 * pool], self.resident.length[3 * pool + 1]
        first = self.resident.queue[key] == 3 * pool + 2
        goes_to = 3 * pool if first and self.ghost.queue[key] == NOWHERE else 3 * pool + 1
        if self.ghost.queue[key] != NOWHERE:
            step = t1 if self.ghost.queue[key] == 2 * pool else -t2
            self.target[pool] = min(max(self.target[pool] + step, 0), self.capacity[pool])
            leave(self.ghost, key)
        leave(self.resident, key)
        enter(self.resident, goes_to, key)
        if first:
            t1, t2 = self.resident.length[3 * pool], self.resident.length[3 * pool + 1]
            shorten(self.ghost, 2 * pool, self.capacity[pool] - t1)
            shorten(self.ghost, 2 * pool + 1, 2 * self.capacity[pool] - t1 - t2 - self.ghost.length[2 * pool])

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        side = self.resident.queue[key] - 3 * pool
        leave(self.resident, key)
        if side < 2:
            enter(self.ghost, 2 * pool + side, key)
            t1, t2 = self.resident.length[3 * pool], self.resident.length[3 * pool + 1]
            shorten(self.ghost, 2 * pool, self.capacity[pool] - t1)
            shorten(self.ghost, 2 * pool + 1, 2 * self.capacity[pool] - t1 - t2 - self.ghost.length[2 * pool])

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        unused = oldest_free(self.resident, 3 * pool + 2, holds, limit)
        if unused >= 0:
            return unused
        once = oldest_free(self.resident, 3 * pool, holds, limit)
        again = oldest_free(self.resident, 3 * pool + 1, holds, limit)
        over = self.resident.length[3 * pool] > self.target[pool]
        return once if once >= 0 and (over or again < 0) else again
