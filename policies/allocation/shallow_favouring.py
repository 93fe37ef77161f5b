"""All experts of the first layers, and what remains for the others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints


class ShallowFavouring(NamedTuple):
    """Keep all experts of the first layers, whose predictions are worst, and divide the rest among the deeper ones.

    Fate (arXiv 2502.12224; released code, FFFzy/Fate_open 3bcfdb4, `utils/memory_cost.py`): the first `full_layers`
    layers whole where the budget allows, else as many as fit. The code leaves deeper layers with no slot at all and
    streams their experts through buffers outside the budget; here memory is equal for all systems, so every layer
    first gets room for one token's top-k, and slots that the code leaves over go to the first of the deeper layers.
    """

    full_layers: int

    @classmethod
    def build(cls, full_layers: int = 4) -> ShallowFavouring:
        """`full_layers` layers are kept whole."""
        if full_layers < 0:
            raise ValueError(f"full_layers is {full_layers}: it must be at least 0")
        return cls(full_layers)

    def divide(self, slots: int, layers: int, experts: int, top_k: int) -> tuple[Ints, Ints]:  # noqa: D102
        least = min(top_k, slots // layers)
        capacity = np.full(layers, least)
        left = slots - least * layers
        for layer in range(min(self.full_layers, layers)):
            given = min(left, experts - least)
            capacity[layer] += given
            left -= given
        deeper = np.arange(self.full_layers, layers)
        while left > 0 and len(deeper) > 0:
            share = np.full(len(deeper), left // len(deeper))
            share[: left % len(deeper)] += 1
            share = np.minimum(share, experts - capacity[deeper])
            if not share.any():
                break
            capacity[deeper] += share
            left -= int(share.sum())
        return np.arange(layers), capacity
