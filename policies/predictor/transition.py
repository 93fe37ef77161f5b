"""A table of which experts followed which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Seen, Setting
from policies.ranking import note_seen, rank


class Transition(NamedTuple):
    """Expect the experts that followed, `ahead` layers later, those that this layer just used.

    A first-order table of expert pairs counted while running, as look-up-table predictors build it offline
    (EdgeMoE, arXiv 2308.14352, keys its dictionary by two layers; one layer is kept here). With several tokens in a step
    the pairs are counted over the shares of tokens that used each expert. The table does not reach over the end of a
    step, so layer 0 is never predicted.
    """

    pairs: Floats
    """[reach, L, E, E] how often the second expert was used at layer l + reach + 1 when the first was at layer l."""
    total: Floats
    """[reach, L, E] sum of `pairs` over the second expert."""
    share: Floats
    """[L, E] share of the running step's tokens that use each expert."""
    routed: Ints
    """[L, E] experts of the running step in order of first appearance, -1 behind the last: sums go in this order, so
    that their rounding does not depend on how experts are numbered."""
    seen_at: Ints
    """[L, E] when each expert was routed last."""
    expected: Floats
    """[E] what a prediction adds up."""

    @classmethod
    def build(cls, setting: Setting, reach: int = 1) -> Transition:
        """Start with an empty table for predictions up to `reach` layers ahead."""
        if reach < 1:
            raise ValueError(f"reach is {reach}: it must be at least 1")
        shape = (setting.layers, setting.experts)
        return cls(
            pairs=np.zeros((reach, *shape, setting.experts)),
            total=np.zeros((reach, *shape)),
            share=np.zeros(shape),
            routed=np.full(shape, -1, np.int64),
            seen_at=np.zeros(shape, np.int64),
            expected=np.zeros(setting.experts),
        )

    def observe(self, seen: Seen) -> None:  # noqa: D102
        layer = seen.layer
        share, routed = self.share[layer], self.routed[layer]
        share[:] = 0.0
        routed[:] = -1
        count = 0
        for expert in seen.experts.ravel():
            if expert >= 0:
                if share[expert] == 0.0:
                    routed[count] = expert
                    count += 1
                share[expert] += 1.0 / len(seen.experts)
        used = 0.0
        for expert in routed[:count]:
            used += share[expert]
        for ahead in range(1, min(len(self.pairs), layer) + 1):
            for before in self.routed[layer - ahead]:
                if before < 0:
                    break
                weight = self.share[layer - ahead, before]
                followers = self.pairs[ahead - 1, layer - ahead, before]
                for expert in routed[:count]:
                    followers[expert] += weight * share[expert]
                self.total[ahead - 1, layer - ahead, before] += weight * used
        note_seen(self.seen_at[layer], seen.experts, seen.event)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        layer = seen.layer
        if ahead > len(self.pairs) or layer + ahead >= len(self.share):
            return 0
        expected = self.expected
        expected[:] = 0.0
        for before in self.routed[layer]:
            if before < 0:
                break
            total = self.total[ahead - 1, layer, before]
            if total > 0:
                expected += self.share[layer, before] * self.pairs[ahead - 1, layer, before] / total
        return rank(expected, self.seen_at[layer + ahead], ids, scores)
