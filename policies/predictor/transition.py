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
    """[L, E] experts of the running step in order of first appearance: sums go in this order, so that their rounding does
    not depend on how experts are numbered."""
    used: Ints
    """[L] how many those are."""
    seen_at: Ints
    """[L, E] when each expert was routed last."""
    expected: Floats
    """[E] what a prediction adds up."""
    addend: Floats
    """[E] what it adds next: memory of its own, since taking new costs more than the sum."""

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
            routed=np.zeros(shape, np.int64),
            used=np.zeros(setting.layers, np.int64),
            seen_at=np.zeros(shape, np.int64),
            expected=np.zeros(setting.experts),
            addend=np.zeros(setting.experts),
        )

    def observe(self, seen: Seen) -> None:  # noqa: D102
        layer = seen.layer
        share, routed = self.share[layer], self.routed[layer]
        share[:] = 0.0
        count = 0
        for token in seen.experts:
            for expert in token:
                if expert >= 0:
                    if share[expert] == 0.0:
                        routed[count] = expert
                        count += 1
                    share[expert] += 1.0 / len(seen.experts)
        self.used[layer] = count
        mass = 0.0
        for expert in routed[:count]:
            mass += share[expert]
        for ahead in range(1, min(len(self.pairs), layer) + 1):
            for before in self.routed[layer - ahead, : self.used[layer - ahead]]:
                weight = self.share[layer - ahead, before]
                followers = self.pairs[ahead - 1, layer - ahead, before]
                for expert in routed[:count]:
                    followers[expert] += weight * share[expert]
                self.total[ahead - 1, layer - ahead, before] += weight * mass
        note_seen(self.seen_at[layer], seen.experts, seen.event)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        layer = seen.layer
        if ahead > len(self.pairs) or layer + ahead >= len(self.share):
            return 0
        expected = self.expected
        expected[:] = 0.0
        for before in self.routed[layer, : self.used[layer]]:
            total = self.total[ahead - 1, layer, before]
            if total > 0:
                np.multiply(self.pairs[ahead - 1, layer, before], self.share[layer, before] / total, self.addend)
                np.add(expected, self.addend, expected)
        return rank(expected, self.seen_at[layer + ahead], ids, scores)
