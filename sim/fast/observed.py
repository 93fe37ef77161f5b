"""What predictors see of a trace: whole numbers as they lie in the file, floats widened part by part."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from policies.contract import Seen
from sim.fast.native import NUMBER, compiled

_FLOATS = {"weights": "weights", "lookahead_scores": "lookahead", "router_logits": "logits"}
"""Arrays of floats, and what a policy must need to see them."""


class Observed(NamedTuple):
    """The arrays of `policies.contract.Seen` for all layers.

    Rows of whole numbers are those of the trace, or of a copy for one part; rows of floats (float32) are those of the part.
    """

    experts: Any
    weights: Any
    request: Any
    lookahead_experts: Any
    lookahead_scores: Any
    router_logits: Any


def make_floats(trace: Any, needs: frozenset[str], most: int) -> dict[str, Any]:
    """Return room for the floats of parts of at most `most` rows, by field of `Observed`; what nobody needs has no rows."""
    floats = {}
    for name, need in _FLOATS.items():
        shape = getattr(trace, name).shape[1:] if need in needs else (trace.model.layers, 0, 0)[: 2 + (need == "lookahead")]
        floats[name] = np.zeros((most if need in needs else 0, *shape), np.float32)
    return floats


def make_observed(trace: Any, rows: Any, needs: frozenset[str], floats: dict[str, Any]) -> Observed:
    """Return what predictors see of `rows` of a trace, with the floats of `make_floats`."""
    nothing = np.zeros((0, trace.model.layers, 0, 0), np.int8)
    return Observed(
        experts=trace.experts[rows],
        request=trace.request[rows].astype(np.int64),
        lookahead_experts=trace.lookahead_experts[rows] if "lookahead" in needs else nothing,
        **floats,
    )


def show_floats(trace: Any, rows: Any, floats: dict[str, Any]) -> None:
    """Write the floats of `rows` [n] of a trace; half floats several times faster than NumPy does it."""
    for name, wide in floats.items():
        if not len(wide):
            continue
        stored = getattr(trace, name)
        if stored.dtype == np.float16:
            bits = np.ascontiguousarray(stored).view(np.uint16).reshape(len(stored), -1)
            compiled(_widen)(bits, rows, wide.reshape(len(wide), -1))
        else:
            wide[: len(rows)] = stored[rows]


def _widen(bits: Any, rows: Any, wide: Any) -> None:
    """Write `rows` of half floats, given as their bits (uint16), to `wide` (float32)."""
    for index in range(len(rows)):
        row = rows[index]
        for place in range(bits.shape[1]):
            half = np.uint32(bits[row, place])
            magnitude = (half & np.uint32(0x7FFF)) << np.uint32(13)
            # Infinity and what is no number have an exponent of their own.
            magnitude |= np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
            number = np.uint32(magnitude | ((half & np.uint32(0x8000)) << np.uint32(16)))
            # The difference of the two exponents' offsets; also mends small numbers.
            wide[index, place] = number.view(np.float32) * np.float32(2.0**112)


@njit(forceinline=True)
def see(told: Any, observed: Any) -> Any:
    """Return the running event as a predictor sees it."""
    now, layer = told.seen[0], told.seen[1] & NUMBER
    first, last, first_float = told.seen[2] & NUMBER, told.seen[3] & NUMBER, told.seen[4] & NUMBER
    last_float = (first_float + last - first) & NUMBER
    return Seen(
        now,
        layer,
        observed.experts[first:last, layer],
        observed.weights[first_float:last_float, layer],
        observed.request[first:last],
        observed.lookahead_experts[first:last, layer],
        observed.lookahead_scores[first_float:last_float, layer],
        observed.router_logits[first_float:last_float, layer],
    )
