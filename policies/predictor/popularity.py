"""The experts used most so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Seen, Setting
from policies.ranking import note_seen, rank


class Popularity(NamedTuple):
    """Expect of each layer the experts that it has used most often since the start.

    Counted while running, so nothing is known beforehand; of equally popular experts the more recent comes first.
    """

    uses: Floats
    """[L, E] tokens that used each expert."""
    seen_at: Ints
    """[L, E] when each expert was routed last."""

    @classmethod
    def build(cls, setting: Setting) -> Popularity:
        """Start with no uses counted."""
        shape = (setting.layers, setting.experts)
        return cls(np.zeros(shape), np.zeros(shape, np.int64))

    def observe(self, seen: Seen) -> None:  # noqa: D102
        uses = self.uses[seen.layer]
        for token in seen.experts:
            for expert in token:
                if expert >= 0:
                    uses[expert] += 1.0
        note_seen(self.seen_at[seen.layer], seen.experts, seen.event)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        layer = (seen.layer + ahead) % len(self.uses)
        return rank(self.uses[layer], self.seen_at[layer], ids, scores)
