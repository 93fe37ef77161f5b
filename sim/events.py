"""Events: the distinct experts that each (step, layer) needs, in order, as flat arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policies.contract import NEVER, Future, Ints


class Events(NamedTuple):
    """Event i = step * layers + layer needs ``keys[offsets[i]:offsets[i + 1]]``."""

    layers: int
    experts: int
    offsets: Ints
    """[events + 1]"""
    keys: Ints
    """Expert keys; within an event distinct, in order of first appearance (token by token, descending weight)."""
    tokens: Ints
    """How many of the event's tokens use each key."""

    @property
    def total(self) -> int:
        """Number of events."""
        return len(self.offsets) - 1


def make_events(experts: npt.NDArray[np.integer], step_offsets: Ints, expert_count: int) -> Events:
    """Return the events of routed ids `experts` [N, L, K] whose rows ``step_offsets[s]:step_offsets[s + 1]`` are step s.

    Ids of -1 (a token that used fewer than K) are left out.
    """
    layers = experts.shape[1]
    first_key = np.arange(layers, dtype=np.int64) * expert_count
    offsets, keys, tokens = [0], [], []
    for start, end in zip(step_offsets[:-1].tolist(), step_offsets[1:].tolist(), strict=True):
        for layer in range(layers):
            routed = experts[start:end, layer].ravel()
            routed = routed[routed >= 0]
            if end - start > 1:
                distinct, first, count = np.unique(routed, return_index=True, return_counts=True)
                order = np.argsort(first)
                routed, uses = distinct[order], count[order]
            else:
                uses = np.ones(len(routed), np.int64)
            keys.append(routed + first_key[layer])
            tokens.append(uses)
            offsets.append(offsets[-1] + len(routed))
    return Events(
        layers,
        expert_count,
        np.array(offsets, np.int64),
        np.concatenate(keys).astype(np.int64) if keys else np.zeros(0, np.int64),
        np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(0, np.int64),
    )


def one_key_events(events: Events) -> Events:
    """Return the same accesses with one key per event: the `sequential` replay of older papers."""
    return events._replace(offsets=np.arange(len(events.keys) + 1, dtype=np.int64))


def future_of(events: Events) -> Future:
    """Return what clairvoyant policies receive: for every access the next event that needs the same key."""
    event_of = np.repeat(np.arange(events.total), np.diff(events.offsets))
    following = np.full(len(events.keys), NEVER, np.int64)
    order = np.lexsort((event_of, events.keys))
    same = events.keys[order[:-1]] == events.keys[order[1:]]
    following[order[:-1][same]] = event_of[order[1:][same]]
    first = np.full(events.layers * events.experts, NEVER, np.int64)
    first[events.keys[::-1]] = event_of[::-1]
    return Future(events.offsets, events.keys, following, first)
