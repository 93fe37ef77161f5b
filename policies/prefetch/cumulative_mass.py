"""The fewest experts that hold a share of the predicted mass."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Floats, Setting


class CumulativeMass(NamedTuple):
    """Fetch the best predictions until they hold the share `mass` of all predicted scores.

    FineMoE (arXiv 2502.05370) takes experts by descending probability up to a cumulative threshold; the mass counts
    what the predictor lists, so a trace that records few ranked experts makes it stop earlier.
    """

    depth: int
    mass: float

    @classmethod
    def build(cls, setting: Setting, mass: float = 0.8, depth: int = 1) -> CumulativeMass:
        """`mass` between 0 (nothing) and 1 (everything predicted)."""
        if not 0 <= mass <= 1:
            raise ValueError(f"mass is {mass}: it must lie between 0 and 1")
        return cls(depth, mass)

    def take(self, scores: Floats, count: int, tokens: int) -> int:  # noqa: D102
        wanted = self.mass * scores[:count].sum()
        held = 0.0
        for taken in range(count):
            if held >= wanted:
                return taken
            held += scores[taken]
        return count
