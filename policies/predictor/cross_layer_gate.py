"""The gate of a coming layer on this layer's gate input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Floats, Ints, Seen, Setting, needs
from policies.ranking import rank


@needs("lookahead")
class CrossLayerGate(NamedTuple):
    """Expect what the gate of the coming layer says when it is given this layer's gate input.

    Fate (arXiv 2502.12224; released code, FFFzy/Fate_open 3bcfdb4) looks one layer ahead; HOBBIT (arXiv 2411.01433) and
    others look further. The observations come with the trace (`lookahead_experts`, `lookahead_scores`) and reach as
    deep as was recorded. For one token the recorded ranking is passed on; for several, each token votes for its own
    top-k: with its probabilities, or with one vote each (`count_votes`, what Fate's code does in prefill). Layer 0 is
    never predicted.
    """

    layers: int
    experts: int
    top_k: int
    count_votes: bool

    @classmethod
    def build(cls, setting: Setting, count_votes: bool = False) -> CrossLayerGate:
        """Keep the shapes; there is no state."""
        return cls(setting.layers, setting.experts, setting.top_k, count_votes)

    def predict(self, seen: Seen, ahead: int, ids: Ints, scores: Floats) -> int:  # noqa: D102
        if seen.layer + ahead >= self.layers or ahead > seen.lookahead_experts.shape[1]:
            return 0
        ranked = seen.lookahead_experts[:, ahead - 1]
        probability = seen.lookahead_scores[:, ahead - 1]
        if len(ranked) == 1:
            count = 0
            while count < min(len(ids), ranked.shape[1]) and ranked[0, count] >= 0:
                ids[count] = ranked[0, count]
                scores[count] = probability[0, count]
                count += 1
            return count
        votes = np.zeros(self.experts)
        first_vote = np.zeros(self.experts, np.int64)  # earlier tokens and ranks win ties
        for token in range(len(ranked)):
            for place in range(min(self.top_k, ranked.shape[1])):
                expert = ranked[token, place]
                if expert >= 0:
                    votes[expert] += 1.0 if self.count_votes else probability[token, place]
                    if first_vote[expert] == 0:
                        first_vote[expert] = -1 - token * self.top_k - place
        return rank(votes, first_vote, ids, scores)
