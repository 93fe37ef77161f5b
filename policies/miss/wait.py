"""Load and wait."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import LOAD, Setting


class Wait(NamedTuple):
    """Transfer the missing expert and wait for it: the output never changes."""

    @classmethod
    def build(cls, setting: Setting) -> Wait:
        """Keep nothing."""
        return cls()

    def action(self, key: int, now: int) -> int:  # noqa: D102
        return LOAD
