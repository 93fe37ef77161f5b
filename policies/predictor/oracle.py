"""What the router will choose."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Floats, Future, Ints, Seen, Setting, needs


@needs("future")
class Oracle(NamedTuple):
    """Know exactly which experts come: the ceiling of prediction."""

    future: Future
    layers: int

    @classmethod
    def build(cls, setting: Setting) -> Oracle:
        """Keep the future that the setting holds."""
        assert setting.future is not None, "a setting for a policy that needs the future holds it"
        return cls(setting.future, setting.layers)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        event = seen.event + ahead
        if event + 1 >= len(self.future.offsets):
            return 0
        first_key = ((seen.layer + ahead) % self.layers) * len(ids)
        count = 0
        for i in range(self.future.offsets[event], self.future.offsets[event + 1]):
            ids[count] = self.future.keys[i] - first_key
            scores[count] = 1.0
            count += 1
        return count
