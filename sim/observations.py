"""What a policy sees of a workload's trace, one event at a time: the same for the reference engine and the real backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.contract import Seen
from sim.workload import Workload


class Observations:
    """The trace as the policies see it, one event at a time."""

    def __init__(self, workload: Workload, needs: frozenset[str]) -> None:
        trace, rows = workload.trace, workload.rows
        self.starts = workload.offsets.tolist()
        self.experts = trace.experts[rows]
        self.request = workload.request
        self.weights = self.lookahead_experts = self.lookahead_scores = self.router_logits = None
        if "weights" in needs:
            assert trace.weights is not None
            self.weights = trace.weights[rows].astype(np.float32)  # what a policy computes with, in both engines
        if "lookahead" in needs:
            assert trace.lookahead_experts is not None
            assert trace.lookahead_scores is not None
            self.lookahead_experts = trace.lookahead_experts[rows]
            self.lookahead_scores = trace.lookahead_scores[rows].astype(np.float32)
        if "logits" in needs:
            assert trace.router_logits is not None
            self.router_logits = trace.router_logits[rows].astype(np.float32)

    def rows(self, step: int) -> tuple[int, int]:
        """Return the first row of a step and the one after its last."""
        return self.starts[step], self.starts[step + 1]

    def event(self, step: int, layer: int, now: int) -> Seen:
        """Return what a real system sees at this event."""
        rows = slice(self.starts[step], self.starts[step + 1])
        return Seen(
            now,
            layer,
            self.experts[rows, layer],
            _NO_VALUES if self.weights is None else self.weights[rows, layer],
            self.request[rows],
            _NO_RANKING if self.lookahead_experts is None else self.lookahead_experts[rows, layer],
            _NO_RANKING if self.lookahead_scores is None else self.lookahead_scores[rows, layer],
            _NO_VALUES if self.router_logits is None else self.router_logits[rows, layer],
        )


_NO_RANKING: Any = np.zeros((0, 0, 0))
_NO_VALUES: Any = np.zeros((0, 0))
"""What a policy sees of observations that it did not ask for."""
