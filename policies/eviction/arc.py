"""ARC: recency and frequency, balanced by two ghost lists."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Setting
from policies.order import NOWHERE, Queues, enter, leave, make_queues, oldest_free, renew, shorten


class ARC(NamedTuple):
    """Keep experts used once (T1) and again (T2); shift slots to the side whose ghosts (B1, B2) return.

    Source: Megiddo & Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4. A
    prefetch is no use: the expert waits in T1, its ghost stays, and its first use counts as the first,
    but as no miss: the target does not move. No parameters.
    """

    resident: Queues
    """Of pool p: queue 2p is T1, 2p + 1 is T2."""
    ghost: Queues
    """Of pool p: queue 2p is B1, 2p + 1 is B2."""
    target: Floats
    """[pools] slots that T1 should have: p in the paper."""
    capacity: Ints
    """[pools] slots: c in the paper."""
    used: Ints
    """[keys] 1 once used since it took its slot."""
    returning: Ints
    """[keys] 1 for a missing key that was in a ghost list."""
    from_b2: Ints
    """[pools] 1 where the last miss was of a key in B2."""

    @classmethod
    def build(cls, setting: Setting) -> ARC:
        """Start with empty lists and the target at 0."""
        return cls(
            make_queues(setting.keys, 2 * setting.pools),
            make_queues(setting.keys, 2 * setting.pools),
            np.zeros(setting.pools),
            setting.capacity.astype(np.int64),
            np.zeros(setting.keys, np.int64),
            np.zeros(setting.keys, np.int64),
            np.zeros(setting.pools, np.int64),
        )

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        b1, b2 = self.ghost.length[2 * pool], self.ghost.length[2 * pool + 1]
        self.from_b2[pool] = self.ghost.queue[key] == 2 * pool + 1
        if self.ghost.queue[key] != NOWHERE:
            if self.from_b2[pool] == 1:
                self.target[pool] = max(self.target[pool] - max(b1 / b2, 1.0), 0.0)
            else:
                self.target[pool] = min(self.target[pool] + max(b2 / b1, 1.0), float(self.capacity[pool]))
            leave(self.ghost, key)
            self.returning[key] = 1
        self.used[key] = 1

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        enter(self.resident, 2 * pool + self.returning[key], key)
        self.returning[key] = 0
        self.from_b2[pool] = 0
        t1, t2 = self.resident.length[2 * pool], self.resident.length[2 * pool + 1]
        shorten(self.ghost, 2 * pool, self.capacity[pool] - t1)
        shorten(self.ghost, 2 * pool + 1, 2 * self.capacity[pool] - t1 - t2 - self.ghost.length[2 * pool])

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        if self.used[key] == 1 or self.ghost.queue[key] != NOWHERE:
            leave(self.resident, key)
            enter(self.resident, 2 * pool + 1, key)
            if self.ghost.queue[key] != NOWHERE:
                leave(self.ghost, key)
        else:
            renew(self.resident, self.resident.queue[key], key)
        self.used[key] = 1

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        side = self.resident.queue[key]
        leave(self.resident, key)
        if self.used[key] == 1:
            enter(self.ghost, side, key)
            t1, t2 = self.resident.length[2 * pool], self.resident.length[2 * pool + 1]
            shorten(self.ghost, 2 * pool, self.capacity[pool] - t1)
            shorten(self.ghost, 2 * pool + 1, 2 * self.capacity[pool] - t1 - t2 - self.ghost.length[2 * pool])
        self.used[key] = 0

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        once = oldest_free(self.resident, 2 * pool, holds, limit)
        again = oldest_free(self.resident, 2 * pool + 1, holds, limit)
        t1 = self.resident.length[2 * pool]
        over = t1 > self.target[pool] or (t1 == self.target[pool] and self.from_b2[pool] == 1)
        return once if once >= 0 and (over or again < 0) else again
