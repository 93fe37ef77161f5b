"""No prediction."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Floats, Ints, Seen, Setting


class NoPrediction(NamedTuple):
    """Predict nothing."""

    @classmethod
    def build(cls, setting: Setting) -> NoPrediction:
        """Keep nothing."""
        return cls()

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        return 0
