"""Least-Stale: layers already passed leave first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints, Setting
from policies.order import Order, append, make_order, oldest_free, remove, renew


class LeastStale(NamedTuple):
    """Evict experts of layers that the running step has passed, then the others; oldest last use first.

    Source: SpecMD, arXiv 2602.03921, known here from summaries only: the rule is implemented as they tell
    it. "Oldest" is taken to mean the last use, or the load where there was none. The present layer counts
    as passed, since its router has spoken. With one pool per layer this is LRU. No parameters.
    """

    order: Order
    """Queue l holds the residents of layer l by their last use or load."""
    last_use: Ints
    """[keys] event of the last use or load."""
    pool_of: Ints
    """[layers] the pool of each layer."""
    experts: int
    layer: Ints
    """[1] the layer whose event is running."""

    @classmethod
    def build(cls, setting: Setting) -> LeastStale:
        """Start at layer 0 with no uses."""
        order = make_order(setting.keys, setting.layers)
        return cls(order, np.zeros(setting.keys, np.int64), setting.pool_of, setting.experts, np.zeros(1, np.int64))

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.layer[0] = key // self.experts

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.last_use[key] = now
        append(self.order, key // self.experts, key)

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.layer[0] = key // self.experts
        self.last_use[key] = now
        renew(self.order, key // self.experts, key)

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        remove(self.order, key)

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        passed = self.layer[0] + 1
        victim = -1
        for layer in range(len(self.pool_of)):
            if layer == passed and victim >= 0:
                break
            if self.pool_of[layer] == pool:
                key = oldest_free(self.order, layer, holds, limit)
                if key >= 0 and (victim < 0 or self.last_use[key] < self.last_use[victim]):
                    victim = key
        return victim
