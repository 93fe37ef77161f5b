"""The experts of the step before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Seen, Setting, needs
from policies.ranking import note_seen, rank


@needs("weights")
class PreviousToken(NamedTuple):
    """Expect of each layer the experts that it used in the step before, heavier gate weights first.

    The baseline that every prediction paper compares with; its recall is the lag-1 overlap of `trace inspect`.
    Predictions reach over the end of a step: the first layers of the next token can be predicted too.
    """

    mass: Floats
    """[L, E] gate weight that the last step gave each expert."""
    seen_at: Ints
    """[L, E] when each expert was routed last."""

    @classmethod
    def build(cls, setting: Setting) -> PreviousToken:
        """Start without a step before: nothing is predicted in the first."""
        shape = (setting.layers, setting.experts)
        return cls(np.zeros(shape), np.zeros(shape, np.int64))

    def observe(self, seen: Seen) -> None:  # noqa: D102
        mass = self.mass[seen.layer]
        mass[:] = 0.0
        for token in range(len(seen.experts)):
            for place, expert in enumerate(seen.experts[token]):
                if expert >= 0:
                    mass[expert] += max(seen.weights[token, place], 1e-9)
        note_seen(self.seen_at[seen.layer], seen.experts, seen.event)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        layer = (seen.layer + ahead) % len(self.mass)
        return rank(self.mass[layer], self.seen_at[layer], ids, scores)
