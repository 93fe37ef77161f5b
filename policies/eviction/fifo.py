"""First in, first out."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Ints, Setting
from policies.order import Order, append, make_order, oldest_free, remove


class FIFO(NamedTuple):
    """Evict the expert that took its slot first, however often it was used since.

    Source: folklore; the baseline of Belady, IBM Systems Journal 5(2), 1966. No parameters.
    """

    order: Order

    @classmethod
    def build(cls, setting: Setting) -> FIFO:
        """Start with one empty queue per pool."""
        return cls(make_order(setting.keys, setting.pools))

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        append(self.order, pool, key)

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        remove(self.order, key)

    def victim(self, pool: int, holds: Ints, limit: int, now: int) -> int:  # noqa: D102
        return oldest_free(self.order, pool, holds, limit)
