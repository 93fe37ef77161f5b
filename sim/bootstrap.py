"""Paired bootstrap over requests: would two systems still differ had other requests been recorded?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Floats, Ints
from traces.errors import InputError

RESAMPLES = 2_000
"""How often the requests are drawn anew."""

FEWEST_REQUESTS = 5
"""Below this nothing is claimed: of 4 requests there are only 35 different resamples."""

_DRAWN_AT_ONCE = 1 << 21
"""Requests drawn in one go: bounds the memory, about 16 bytes each."""


class Comparison(NamedTuple):
    """How fast one system is, as a multiple of another's tokens/s."""

    ratio: float
    """Tokens/s of the first over tokens/s of the second, all requests together."""
    low: float
    """Lower end of the 95 % interval of that ratio."""
    high: float
    """Upper end of it."""
    is_real: bool | None
    """True where the interval excludes 1; None where there are too few requests to say."""
    requests: int
    """How many requests both rows hold."""
    reason: str
    """Why `is_real` is None; "" otherwise."""


def compare_speed(
    first: Mapping[str, Any], second: Mapping[str, Any], seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Compare two rows that hold the same requests.

    The statistic is (sum of tokens / sum of ns) of the first row over that of the second. Each resample draws
    as many requests as there are, with replacement, and the same ones for both rows; the interval runs from
    the 2.5th to the 97.5th percentile. The order in which a row lists its requests does not matter.

    Raises InputError where the rows hold different requests.
    """
    requests, tokens, time = _sorted(first)
    others, other_tokens, other_time = _sorted(second)
    if not np.array_equal(requests, others):
        raise InputError(
            f"'{_name(first)}' and '{_name(second)}' cannot be compared: one ran {len(requests)} requests, "
            f"the other {len(others)}, and they are not the same; compare rows of one trace and workload"
        )
    count = len(requests)
    if count == 0:
        return Comparison(float("nan"), float("nan"), float("nan"), None, 0, "no requests")
    ratio = float(tokens.sum() / time.sum() / (other_tokens.sum() / other_time.sum()))
    ratios = np.empty(resamples)
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, block):
        drawn = generator.integers(count, size=(min(block, resamples - start), count), dtype=np.int32)
        # Both sides are summed by the same operation in the same order: equal rows give exactly 1.
        speed = tokens[drawn].sum(axis=1) / time[drawn].sum(axis=1)
        other_speed = other_tokens[drawn].sum(axis=1) / other_time[drawn].sum(axis=1)
        ratios[start : start + len(drawn)] = speed / other_speed
    low, high = (float(end) for end in np.percentile(ratios, [2.5, 97.5]))
    if count < FEWEST_REQUESTS:
        return Comparison(ratio, low, high, None, count, "too few requests")
    return Comparison(ratio, low, high, low > 1 or high < 1, count, "")


def _sorted(row: Mapping[str, Any]) -> tuple[Ints, Ints, Floats]:
    """Return request ids, tokens and ns, ascending by id."""
    requests = np.asarray(row["requests"], np.int64)
    order = np.argsort(requests, kind="stable")
    tokens = np.asarray(row["request_tokens"], np.int64)
    time = np.asarray(row["request_ns"], np.float64)
    return requests[order], tokens[order], time[order]


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("system", "?"))
