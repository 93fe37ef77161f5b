"""Uses divided by age."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Ints, Setting


class LFRU(NamedTuple):
    """Evict the expert with the fewest uses per age, where age is one step plus the time since the last use.

    Source: the score "uses / (clock - last use + 1)" of tinyserve (github.com/e1n00r/tinyserve,
    cache_policy.py), whose author calls the cache of vLLM pull request 37190 by the same name; it is not
    the two-partition LFRU of content networks. As there, an eviction forgets the uses. Unlike there, the
    clock ticks in steps and not in accesses. No parameters.
    """

    uses: Ints
    """[keys] uses since the key took its slot; a prefetch is none."""
    last_use: Ints
    """[keys] event of the last use."""
    layers: int
    """Events of one step."""

    @classmethod
    def build(cls, setting: Setting) -> LFRU:
        """Start with no uses."""
        return cls(np.zeros(setting.keys, np.int64), np.zeros(setting.keys, np.int64), setting.layers)

    def on_miss(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] = 1
        self.last_use[key] = now

    def on_insert(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        pass

    def on_hit(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] += 1
        self.last_use[key] = now

    def on_evict(self, key: int, pool: int, now: int) -> None:  # noqa: D102
        self.uses[key] = 0

    def score(self, key: Any, now: int) -> Any:  # noqa: D102
        return self.uses[key] / (now - self.last_use[key] + self.layers)
