"""Least frequently used."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Ints, Setting, steady

ONE_USE = 1 << 40
"""Weight of a use beside the event of the last use: more events than any trace has."""


@steady()
class LFU(NamedTuple):
    """Evict the expert used least often since it took its slot; of equals, the one whose last use is oldest.

    Source: folklore; in-cache LFU with the tie rule of libCacheSim. An evicted expert's count is
    forgotten; counts that survive eviction are `policies.eviction.lrfu.LRFU` with decay 1. No parameters.
    """

    uses: Ints
    """[keys] uses since the key took its slot; a prefetch is none."""
    last_use: Ints
    """[keys] event of the last use."""

    @classmethod
    def build(cls, setting: Setting) -> LFU:
        """Start with no uses."""
        return cls(np.zeros(setting.keys, np.int64), np.zeros(setting.keys, np.int64))

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] = 1
        self.last_use[key] = now

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] += 1
        self.last_use[key] = now

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] = 0

    def score(self, key: Any, now: int) -> Any:  # noqa: D102
        return self.uses[key] * ONE_USE + self.last_use[key]
