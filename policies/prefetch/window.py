"""As many experts as the link brings in one layer's time."""

from __future__ import annotations

from typing import NamedTuple

from policies.contract import Setting


class Window(NamedTuple):
    """Fetch as many of the best predictions as the link can bring while one layer computes.

    Fate's released code (FFFzy/Fate_open 3bcfdb4, `prefetch_k`): n = floor(layer time / transfer time), measured
    beforehand; with several tokens everything predicted is fetched. Where a transfer outlasts a layer n would be 0;
    `least` experts are fetched all the same.
    """

    depth: int
    n: int
    experts: int

    @classmethod
    def build(cls, setting: Setting, depth: int = 1, least: int = 1) -> Window:
        """Work out n from the times that the setting gives; a free link brings everything."""
        if least < 0:
            raise ValueError(f"least is {least}: it must be at least 0")
        n = setting.layer_ns // setting.transfer_ns if setting.transfer_ns else setting.experts
        return cls(depth, max(n, least), setting.experts)

    def most(self, tokens: int) -> int:  # noqa: D102
        return self.n if tokens == 1 else self.experts
