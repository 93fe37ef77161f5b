"""Least recently and frequently used: a decayed use count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Setting, steady

RESCALE_AT = 2.0**300
"""Growth at which all weights are scaled back. A power of two, so that scaling rounds nothing."""


@steady(changed="rescaled")
class LRFU(NamedTuple):
    """Evict the expert with the smallest use count, where a use made n steps ago counts ``decay ** n``.

    Source: Lee et al., "LRFU: a spectrum of policies that subsumes LRU and LFU", IEEE Transactions on
    Computers 50(12), 2001: the combined recency and frequency value with the weighing function ``decay **
    age``. Unlike there, the count of an evicted expert is kept (there are few experts).

    Parameter `decay`: per step (one token in decode), in (0, 1]; at 1/2 and below it is LRU, at 1 a use
    count that nothing forgets. Only the ratio of two counts matters, so instead of every old use
    shrinking, every new use counts for more: multiplications and additions only, which give the same bits
    compiled and interpreted.
    """

    weight: Floats
    """[keys] decayed count of uses, times the present growth."""
    growth: Floats
    """[1] what a use counts now."""
    clock: Floats
    """[1] the event that `growth` belongs to."""
    growth_per_event: float
    rescaled: Ints
    """[1] how often the weights were scaled back: very small ones then become equal."""

    @classmethod
    def build(cls, setting: Setting, decay: float = 0.96) -> LRFU:
        """Start with no uses."""
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], not {decay}")
        growth_per_event = decay ** (-1 / setting.layers)
        return cls(np.zeros(setting.keys), np.ones(1), np.zeros(1), growth_per_event, np.zeros(1, np.int64))

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        while self.clock[0] < now:
            self.clock[0] += 1
            self.growth[0] *= self.growth_per_event
            if self.growth[0] > RESCALE_AT:
                self.growth[0] /= RESCALE_AT
                self.weight[:] /= RESCALE_AT
                self.rescaled[0] += 1
        self.weight[key] += self.growth[0]

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        while self.clock[0] < now:
            self.clock[0] += 1
            self.growth[0] *= self.growth_per_event
            if self.growth[0] > RESCALE_AT:
                self.growth[0] /= RESCALE_AT
                self.weight[:] /= RESCALE_AT
                self.rescaled[0] += 1
        self.weight[key] += self.growth[0]

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def score(self, key: Any, now: int) -> Any:  # noqa: D102
        return self.weight[key]
