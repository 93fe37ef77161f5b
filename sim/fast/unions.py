"""Events of routed ids, and what clairvoyant policies know of them, as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np


def unions(experts: Any, step_offsets: Any, expert_count: int) -> Any:
    """Return offsets, keys and tokens of `sim.events.Events` for the ids [N, L, K] of steps."""
    rows, layers, top_k = experts.shape
    steps = len(step_offsets) - 1
    offsets = np.zeros(steps * layers + 1, np.int64)
    keys = np.empty(rows * layers * top_k, np.int32)
    tokens = np.empty(rows * layers * top_k, np.int32)
    place_of = np.full(expert_count, -1, np.int64)
    event = filled = 0
    for step in range(steps):
        for layer in range(layers):
            start = filled
            for row in range(step_offsets[step], step_offsets[step + 1]):
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
                        tokens[filled] = 1
                        filled += 1
            event += 1
            offsets[event] = filled
    return offsets, keys[:filled], tokens[:filled]


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


def widen_halves(halves: Any, bits: Any, floats: Any) -> None:
    """Write half floats, given as their bits (uint16), to `floats` (float32), whose memory `bits` (uint32) shares."""
    for index in range(len(halves)):
        half = np.uint32(halves[index])
        magnitude = (half & np.uint32(0x7FFF)) << np.uint32(13)
        if magnitude >= np.uint32(0x0F800000):  # infinity and what is no number
            magnitude |= np.uint32(0x7F800000)
        bits[index] = magnitude | ((half & np.uint32(0x8000)) << np.uint32(16))
    for index in range(len(floats)):
        floats[index] *= np.float32(2.0**112)  # the difference of the two exponents' offsets; also mends small numbers
