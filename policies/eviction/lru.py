"""Least recently used."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Ints, Setting
from policies.order import Order, append, make_order, oldest_free, remove, renew


class LRU(NamedTuple):
    """Evict the expert whose last use is oldest; a load counts as a use.

    Source: folklore; analysed by Mattson et al., "Evaluation techniques for storage hierarchies", IBM
    Systems Journal 9(2), 1970. No parameters.
    """

    order: Order

    @classmethod
    def build(cls, setting: Setting) -> LRU:
        """Start with one empty queue per pool."""
        return cls(make_order(setting.keys, setting.pools))

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        append(self.order, pool, key)

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        renew(self.order, pool, key)

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        remove(self.order, key)

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        return oldest_free(self.order, pool, holds, limit)
