"""Turn scores per expert into a ranking, with ties broken by what was seen, never by an expert's number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from policies.contract import Floats, Ints


def rank(by_expert: Floats, seen_at: Ints, ids: Ints, scores: Floats) -> int:
    """Write the best experts whose score is above 0 into `ids` and `scores` [at most], best first, and return how many.

    `by_expert` [E] are the scores; of equal ones the expert with the larger `seen_at` [E] comes first.
    """
    count, most = 0, len(ids)
    least = 0.0  # below it nothing is ranked; 0 until the ranking is full
    for expert in range(len(by_expert)):
        score = by_expert[expert]
        if score < least or score <= 0 or most == 0:
            continue
        if count == most:
            if score == least and seen_at[expert] <= seen_at[ids[count - 1]]:
                continue
        else:
            count += 1
        place = count - 1
        while place > 0:
            ahead = ids[place - 1]
            if score < scores[place - 1] or (score == scores[place - 1] and seen_at[expert] <= seen_at[ahead]):
                break
            ids[place] = ahead
            scores[place] = scores[place - 1]
            place -= 1
        ids[place] = expert
        scores[place] = score
        if count == most:
            least = scores[count - 1]
    return count


def note_seen(seen_at: Ints, experts: npt.NDArray[np.integer], event: int) -> None:
    """Mark `experts` [n, K] (-1 is none) as seen at `event`; of one event, those listed first rank higher."""
    moment = (event + 1) << 20  # leaves room for a million routed experts in one event
    tokens, top_k = experts.shape
    for token in range(tokens - 1, -1, -1):
        for place in range(top_k - 1, -1, -1):
            expert = experts[token, place]
            if expert >= 0:
                moment += 1
                seen_at[expert] = moment  # of an expert routed twice the last assignment stays
