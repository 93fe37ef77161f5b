"""An oracle of chosen quality."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Future, Ints, Seen, Setting, needs, numbers_matter
from policies.ranking import rank


@needs("future")
@numbers_matter("wrong experts are drawn by their number")
class NoisyOracle(NamedTuple):
    """Predict each coming expert with probability `recall` and each other one with `false_positive_rate`.

    What is a prediction of that quality worth? Right and wrong experts are ranked at random. The draws are a
    function of seed, event, depth and expert, so every system that is compared meets the same luck.
    """

    future: Future
    layers: int
    experts: int
    recall: float
    false_positive_rate: float
    seed: int

    @classmethod
    def build(cls, setting: Setting, recall: float = 0.8, false_positive_rate: float = 0.02) -> NoisyOracle:
        """Keep the future and both rates (per expert, 0 to 1)."""
        for name, rate in (("recall", recall), ("false_positive_rate", false_positive_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} is {rate}: it must lie between 0 and 1")
        assert setting.future is not None, "a setting for a policy that needs the future holds it"
        # YAML's 0 is a whole number; an array of whole numbers would cut the other rate off.
        return cls(setting.future, setting.layers, setting.experts, float(recall), float(false_positive_rate), setting.seed)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        event = seen.event + ahead
        if event + 1 >= len(self.future.offsets):
            return 0
        first_key = ((seen.layer + ahead) % self.layers) * self.experts
        chance = np.full(self.experts, self.false_positive_rate)
        for i in range(self.future.offsets[event], self.future.offsets[event + 1]):
            chance[self.future.keys[i] - first_key] = self.recall
        draw, position = _uniform(self.seed, event, ahead, self.experts)
        return rank(np.where(draw < chance, position, 0.0), np.zeros(self.experts, np.int64), ids, scores)


def _uniform(seed: int, event: int, ahead: int, count: int) -> tuple[Floats, Floats]:
    """Return two rows of `count` numbers in (0, 1): a SplitMix64 hash (Steele et al., OOPSLA 2014) of the arguments."""
    state = np.uint64(((seed * 1_000_003 + event) * 1_000_003 + ahead) & 0xFFFFFFFF) << np.uint64(32)
    z = state + np.arange(2 * count).astype(np.uint64)
    z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    uniform = ((z >> np.uint64(12)).astype(np.float64) + 0.5) / 4503599627370496.0  # 2 ** 52
    return uniform[:count], uniform[count:]
