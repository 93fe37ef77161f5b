"""A fixed number of experts."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Setting


class TopN(NamedTuple):
    """Fetch the `n` best predictions for every token of the step, `depth` layers ahead."""

    depth: int
    n: int

    @classmethod
    def build(cls, setting: Setting, n: int | None = None, depth: int = 1) -> TopN:
        """`n` experts per token (the model's top-k where not given)."""
        if n is not None and n < 0:
            raise ValueError(f"n is {n}: it must be at least 0")
        return cls(depth, setting.top_k if n is None else n)

    def most(self, tokens: int) -> int:  # noqa: D102
        return self.n * tokens
