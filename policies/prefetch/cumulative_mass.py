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
    experts: int

    @classmethod
    def build(cls, setting: Setting, mass: float = 0.8, depth: int = 1) -> CumulativeMass:
        """`mass` between 0 (nothing) and 1 (everything predicted)."""
        if not 0 <= mass <= 1:
            raise ValueError(f"mass is {mass}: it must lie between 0 and 1")
        return cls(depth, float(mass), setting.experts)

    def most(self, tokens: int) -> int:  # noqa: D102
        return self.experts

    def take(self, scores: Floats, count: int) -> int:  # noqa: D102
        total = 0.0
        for place in range(count):
            total += scores[place]
        held = 0.0
        for place in range(count):
            if held >= self.mass * total:
                return place
            held += scores[place]
        return count
