"""No prefetch."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Setting


class NoPrefetch(NamedTuple):
    """Fetch nothing ahead of time; the predictor is not asked."""

    depth: int

    @classmethod
    def build(cls, setting: Setting) -> NoPrefetch:
        """Look no layer ahead."""
        return cls(0)

    def most(self, tokens: int) -> int:  # noqa: D102
        return 0
