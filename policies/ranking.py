"""Turn scores per expert into a ranking, with ties broken by what was seen, never by an expert's number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from policies.contract import Floats, Ints


def rank(by_expert: Floats, seen_at: Ints, ids: Ints, scores: Floats) -> int:
    """Write the experts whose score is above 0 into `ids` and `scores`, best first, and return how many.

    `by_expert` [E] are the scores; of equal ones the expert with the larger `seen_at` [E] comes first.
    """
    order = np.argsort(-seen_at, kind="mergesort")
    order = order[np.argsort(-by_expert[order], kind="mergesort")]
    count = int(np.sum(by_expert > 0))
    ids[:count] = order[:count]
    scores[:count] = by_expert[order[:count]]
    return count


def note_seen(seen_at: Ints, experts: npt.NDArray[np.integer], event: int) -> None:
    """Mark `experts` (any shape, -1 is none) as seen at `event`; of one event, those listed first rank higher."""
    routed = experts.ravel()[::-1]
    routed = routed[routed >= 0]
    moment = (event + 1) << 20  # leaves room for a million routed experts in one event
    seen_at[routed] = moment + np.arange(len(routed))  # of an expert routed twice the last assignment stays
