"""Curves: all budgets of a policy, or of a system, from one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from policies.contract import needs_of
from policies.system import Composition, Part
from sim.costs import Costs
from sim.engines import build_for, run_engine
from sim.events import Events, future_of
from sim.replay import Misses, one_pool, pool_per_layer, replay
from sim.result import Run
from sim.workload import Workload


def miss_curve(
    eviction: Part, events: Events, slots: Sequence[int], *, per_layer: bool = False, seed: int = 0, engine: str = "auto"
) -> list[Misses]:
    """Return what an eviction policy misses at each number of `slots`, without time: hits and misses of `sim.replay`.

    `eviction` is the policy's class and parameters (`policies.system.find_part`); `slots` are those of the whole device, or
    of every layer where each has its own pool (`per_layer`).
    """
    cls, parameters = eviction
    future = future_of(events) if "future" in needs_of(cls) else None
    divide = pool_per_layer if per_layer else one_pool
    settings = [divide(events, count, future, seed) for count in slots]
    return [replay(cls.build(setting, **parameters), setting, events, engine) for setting in settings]  # type: ignore[attr-defined]


def speed_curve(
    composition: Composition,
    workload: Workload,
    costs: Costs,
    slots: Sequence[int],
    *,
    seed: int = 0,
    engine: str = "auto",
) -> list[Run]:
    """Return what a system does with each number of `slots` on the device, in time: the runs of `sim.engines`.

    Raises InputError where the system cannot run with so few.
    """
    return [
        run_engine(engine, partial(build_for, composition, workload, costs, count, seed), workload, costs)[0]
        for count in slots
    ]
