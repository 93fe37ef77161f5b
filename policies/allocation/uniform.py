"""The same slots for every layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints


class Uniform(NamedTuple):
    """Give every layer its own, equally large pool; slots that do not divide evenly go to the first layers."""

    @classmethod
    def build(cls) -> Uniform:
        """Take no parameters."""
        return cls()

    def divide(self, slots: int, layers: int, experts: int, top_k: int) -> tuple[Ints, Ints]:  # noqa: D102
        capacity = np.full(layers, slots // layers)
        capacity[: slots % layers] += 1
        return np.arange(layers), capacity
