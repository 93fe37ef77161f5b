"""What a system's predictor foretells, layer by layer: precision and recall without a clock.

Predictions depend on what a policy has seen and not on when, so that they can be made again without an engine; their sums
are the engines' integers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Ints
from policies.system import System
from sim.observations import Observations
from sim.workload import Workload


class Predictions(NamedTuple):
    """Counts by the layer that was foretold, over all steps; their sums are those of `sim.result.Run`."""

    predicted: Ints
    """[L] experts that the prefetch rule selected for events that came, resident or not."""
    predicted_and_needed: Ints
    """[L] those that the event then needed."""
    needed_after_prediction: Ints
    """[L] experts needed by events that a prediction had been made for."""


def predictions_by_layer(system: System, workload: Workload) -> Predictions:
    """Let a freshly built `system` see `workload` and count what it predicts: all zero where it never predicts."""
    events, depth = workload.events, system.prefetch.depth
    counts = np.zeros((3, events.layers), np.int64)
    if depth:
        observed = Observations(workload, system.composition.needs)
        ids, scores = np.zeros(events.experts, np.int64), np.zeros(events.experts, np.float64)
        coming: dict[int, set[int]] = {}
        for now in range(events.total):
            step, layer = divmod(now, events.layers)
            foretold = coming.pop(now, None)
            if foretold is not None:
                union = (events.keys[events.offsets[now] : events.offsets[now + 1]] - layer * events.experts).tolist()
                counts[:, layer] += len(foretold), len(foretold.intersection(union)), len(union)
            seen = observed.event(step, layer, now)
            system.observe(seen)
            most = min(system.prefetch.most(len(seen.experts)), events.experts)
            for ahead in range(1, min(depth, events.total - 1 - now) + 1):
                predicted = system.predictor.predict(seen, ahead, ids[:most], scores[:most])
                if predicted:
                    taken = ids[: system.take(scores, predicted)].tolist()
                    coming.setdefault(now + ahead, set()).update(taken)
    return Predictions(*counts)
