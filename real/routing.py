"""What a replay needs of a workload, as plain arrays: who sits where in every step, and what the router has to choose."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sim.workload import Workload


class Segment(NamedTuple):
    """Tokens of one request in one step: rows `start` to `stop` of the step."""

    start: int
    stop: int
    lane: int
    context: int
    """Tokens of the request that are in the cache once these are."""


class ReplayInputs(NamedTuple):
    """S steps of at most N tokens, L layers, K experts per token; what is not there is 0, an expert -1."""

    tokens: list[int]
    """[S] tokens of each step."""
    positions: npt.NDArray[np.int64]
    """[S, N] place of each token in its lane."""
    lanes: npt.NDArray[np.int64]
    """[S, N] row of the KV cache that holds the token's request."""
    forced: npt.NDArray[np.int32]
    """[L, S, N, K] routed experts."""
    segments: list[list[Segment]]
    """By step."""
    lane_count: int
    context: int
    """Most tokens that a lane ever holds."""


def replay_inputs(workload: Workload, steps: int | None = None) -> ReplayInputs:
    """Arrange the first `steps` steps of a workload (all by default)."""
    trace, offsets = workload.trace, workload.offsets.tolist()
    steps = len(workload.decode) if steps is None else min(steps, len(workload.decode))
    tokens = np.diff(workload.offsets[: steps + 1]).tolist()
    most = max(tokens)
    top_k, layers = trace.model.top_k, trace.model.layers
    positions = np.zeros((steps, most), np.int64)
    lanes = np.zeros((steps, most), np.int64)
    forced = np.full((layers, steps, most, top_k), -1, np.int32)
    lane_of = _lanes(workload, steps)
    segments: list[list[Segment]] = []
    for step in range(steps):
        rows = workload.rows[offsets[step] : offsets[step + 1]]
        count = len(rows)
        request = trace.request[rows].tolist()
        positions[step, :count] = trace.position[rows]
        lanes[step, :count] = [lane_of[step][name] for name in request]
        forced[:, step, :count] = trace.experts[rows].transpose(1, 0, 2)
        starts = [0, *(place for place in range(1, count) if request[place] != request[place - 1]), count]
        segments.append(
            [
                Segment(start, stop, lane_of[step][request[start]], int(positions[step, stop - 1]) + 1)
                for start, stop in pairwise(starts)
            ]
        )
    return ReplayInputs(tokens, positions, lanes, forced, segments, int(lanes.max()) + 1, int(positions.max()) + 1)


def _lanes(workload: Workload, steps: int) -> list[dict[int, int]]:
    """Return the lane of every request in every step; a lane is free again after its request's last step."""
    offsets = workload.offsets.tolist()
    present = [dict.fromkeys(workload.request[offsets[step] : offsets[step + 1]].tolist()) for step in range(steps)]
    last = {request: step for step, requests in enumerate(present) for request in requests}
    held: dict[int, int] = {}
    free: list[int] = []
    lanes: list[dict[int, int]] = []
    for step, requests in enumerate(present):
        for request in requests:
            if request not in held:
                held[request] = free.pop() if free else len(held)
        lanes.append(dict(held))
        for request in [request for request in held if last[request] == step]:
            free.append(held.pop(request))
    return lanes
