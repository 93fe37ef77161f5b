"""What the router will choose."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Floats, Future, Ints, Seen, Setting, needs


@needs("future")
class Oracle(NamedTuple):
    """Know exactly which experts come: the ceiling of prediction."""

    future: Future
    layers: int
    experts: int

    @classmethod
    def build(cls, setting: Setting) -> Oracle:
        """Keep the future that the setting holds."""
        assert setting.future is not None, "a setting for a policy that needs the future holds it"
        return cls(setting.future, setting.layers, setting.experts)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        event = seen.event + ahead
        if event + 1 >= len(self.future.offsets):
            return 0
        first_key = ((seen.layer + ahead) % self.layers) * self.experts
        start = self.future.offsets[event]
        count: int = min(len(ids), self.future.offsets[event + 1] - start)
        for place in range(count):
            ids[place] = self.future.keys[start + place] - first_key
            scores[place] = 1.0
        return count
