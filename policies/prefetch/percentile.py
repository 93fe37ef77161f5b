"""Every expert above a percentile of the predicted scores."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Setting


class Percentile(NamedTuple):
    """Fetch the predictions above the `percentile` of the layer's scores, for every token of the step.

    The 75th percentile takes a quarter of the layer's experts: 15 of 60, 16 of 64. The rule by which Fate
    (arXiv 2502.12224) widens its prefetch set beyond the model's top-k.
    """

    depth: int
    n: int

    @classmethod
    def build(cls, setting: Setting, percentile: float = 75, depth: int = 1) -> Percentile:
        """`percentile` between 0 (all experts) and 100 (none)."""
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile is {percentile}: it must lie between 0 and 100")
        return cls(depth, round(setting.experts * (100 - percentile) / 100))

    def most(self, tokens: int) -> int:  # noqa: D102
        return self.n * tokens
