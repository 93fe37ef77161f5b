"""Room for one token, and nothing kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints


class Transient(NamedTuple):
    """Use no more slots than one token's top-k needs, whatever the budget: every layer pushes out the one before."""

    @classmethod
    def build(cls) -> Transient:
        """Take no parameters."""
        return cls()

    def divide(self, slots: int, layers: int, experts: int, top_k: int) -> tuple[Ints, Ints]:  # noqa: D102
        return np.zeros(layers, np.int64), np.array([min(slots, top_k)])
