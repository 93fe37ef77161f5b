"""Events of routed ids, and what clairvoyant policies know of them, as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


def unions(experts: Any, first_rows: Any, last_rows: Any, expert_count: int) -> Any:
    """Return offsets, keys and tokens of `sim.events.Events` for the ids [N, L, K] of steps.

    A step's rows are those from its first to the one before its last; a token names no expert twice in a layer.
    """
    steps, layers, top_k = len(first_rows), experts.shape[1], experts.shape[2]
    most = (last_rows - first_rows).sum() * layers * top_k
    offsets = np.zeros(steps * layers + 1, np.int64)
    keys = np.empty(most, np.int32)
    tokens = np.ones(most, np.int32)
    first_keys = np.repeat(np.arange(layers) * expert_count, top_k).astype(np.int32)
    rows = experts.reshape(len(experts), layers * top_k)
    place_of = np.full(expert_count, -1, np.int64)
    event = filled = 0
    for step in range(steps):
        first_row, last_row = first_rows[step], last_rows[step]
        if first_row + 1 == last_row and _all_there(rows[first_row]):
            ids, found = rows[first_row], keys[filled : filled + layers * top_k]
            for place in range(len(ids)):
                found[place] = first_keys[place] + np.int32(ids[place])
            for _ in range(layers):
                event += 1
                filled += top_k
                offsets[event] = filled
            continue
        for layer in range(layers):
            start = filled
            for row in range(first_row, last_row):
                for rank in range(top_k):
                    expert = experts[row, layer, rank]
                    if expert < 0:
                        continue
                    place = place_of[expert]
                    if place >= start:
                        tokens[place] += 1
                    else:
                        place_of[expert] = filled
                        keys[filled] = layer * expert_count + expert
                        filled += 1
            event += 1
            offsets[event] = filled
    return offsets, keys[:filled], tokens[:filled]


@njit(forceinline=True)
def _all_there(ids: Any) -> Any:
    """Whether a token uses as many experts as it can in every layer: whether no id has a sign."""
    every_bit = 0
    for expert in ids:
        every_bit |= expert
    return every_bit >= 0


def longest(offsets: Any) -> Any:
    """Return how many keys the largest event has."""
    most = 0
    for event in range(len(offsets) - 1):
        most = max(most, offsets[event + 1] - offsets[event])
    return most


def next_uses(offsets: Any, keys: Any, key_count: int, never: int) -> Any:
    """Return for every access the next event that needs the same key, and for every key the first event."""
    following = np.empty(len(keys), np.int64)
    coming = np.full(key_count, never, np.int64)
    for event in range(len(offsets) - 2, -1, -1):
        for access in range(offsets[event], offsets[event + 1]):
            following[access] = coming[keys[access]]
        for access in range(offsets[event], offsets[event + 1]):
            coming[keys[access]] = event
    return following, coming
