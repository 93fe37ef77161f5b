"""Belady's bound: the farthest next use leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

from policies.contract import Future, Ints, Setting, needs, steady


@needs("future")
@steady()
class Belady(NamedTuple):
    """Evict the expert whose next use is farthest; it needs the future, which no real system has.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966 (MIN). Without bypass: a missing expert always takes a slot. Where every event
    needs one expert and nothing is prefetched, no policy has fewer misses. No parameters.
    """

    next_use: Ints
    """[keys] the next event that needs the key, as of its last use."""
    future: Future

    @classmethod
    def build(cls, setting: Setting) -> Belady:
        """Start with the first use of every key as its next."""
        if setting.future is None:
            raise ValueError("Belady needs the future: the setting has none")
        return cls(setting.future.first.copy(), setting.future)

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        for access in range(self.future.offsets[now], self.future.offsets[now + 1]):
            if self.future.keys[access] == key:
                self.next_use[key] = self.future.following[access]

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        for access in range(self.future.offsets[now], self.future.offsets[now + 1]):
            if self.future.keys[access] == key:
                self.next_use[key] = self.future.following[access]

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def score(self, key: Any, now: int) -> Any:  # noqa: D102
        return -self.next_use[key]
