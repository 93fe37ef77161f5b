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
    keys: npt.NDArray[np.int32]
    """Expert keys; within an event distinct, in order of first appearance (token by token, descending weight)."""
    tokens: npt.NDArray[np.int32]
    """How many of the event's tokens use each key."""

    @property
    def total(self) -> int:
        """Number of events."""
        return len(self.offsets) - 1


def make_events(experts: npt.NDArray[np.integer], step_offsets: Ints, expert_count: int) -> Events:
    """Return the events of routed ids `experts` [N, L, K] whose rows ``step_offsets[s]:step_offsets[s + 1]`` are step s.

    Ids of -1 (a token that used fewer than K) are left out.
    """
    from sim.fast.native import compiled
    from sim.fast.unions import unions

    found = compiled(unions)(np.ascontiguousarray(experts), step_offsets[:-1], step_offsets[1:], expert_count)
    return Events(experts.shape[1], expert_count, *found)


def one_key_events(events: Events) -> Events:
    """Return the same accesses with one key per event: the `sequential` replay of older papers."""
    return events._replace(offsets=np.arange(len(events.keys) + 1, dtype=np.int64))


def future_of(events: Events) -> Future:
    """Return what clairvoyant policies receive: for every access the next event that needs the same key."""
    from sim.fast.native import compiled
    from sim.fast.unions import next_uses

    following, first = compiled(next_uses)(events.offsets, events.keys, events.layers * events.experts, NEVER)
    return Future(events.offsets, events.keys, following, first)
