"""Least-Stale: layers already passed leave first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Ints, Setting

AHEAD = 1 << 40
"""What being ahead of the sweep is worth beside the event of the last use: more events than any trace has."""


class LeastStale(NamedTuple):
    """Evict experts of layers that the running step has passed, then the others; oldest last use first.

    Source: SpecMD, arXiv 2602.03921, known here from summaries only: the rule is implemented as they tell
    it. "Oldest" is taken to mean the last use, or the load where there was none. The present layer counts
    as passed, since its router has spoken. With one pool per layer this is LRU. No parameters.
    """

    last_use: Ints
    """[keys] event of the last use or load."""
    layer_of: Ints
    """[keys] layer of every key."""
    layer: Ints
    """[1] the layer whose event is running."""

    @classmethod
    def build(cls, setting: Setting) -> LeastStale:
        """Start at layer 0 with no uses."""
        layer_of = np.repeat(np.arange(setting.layers), setting.experts)
        return cls(np.zeros(setting.keys, np.int64), layer_of, np.zeros(1, np.int64))

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.layer[0] = self.layer_of[key]

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.last_use[key] = now

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.layer[0] = self.layer_of[key]
        self.last_use[key] = now

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def score(self, key: Any, now: int) -> Any:  # noqa: D102
        return self.last_use[key] + AHEAD * (self.layer_of[key] > self.layer[0])
