"""Curves are what single runs give, budget by budget."""

from functools import cache

import numpy as np
import pytest

from policies.system import find_part
from sim.config import compose_config, options
from sim.conformance import build, costs_for, difference, small_trace
from sim.curves import miss_curve, speed_curve
from sim.events import one_key_events
from sim.experiment import composition_of
from sim.reference import run_reference
from sim.workload import make_workload


@cache
def eviction(name):
    return find_part("eviction", compose_config("simulate", [f"eviction={name}"])["eviction"])


@pytest.mark.parametrize("name", options("eviction"))
@pytest.mark.parametrize("order", ["one_request", "continuous"])
def test_the_compiled_replay_misses_what_the_python_loop_misses(name, order):
    """Overflowing events, one pool and one per layer, and one key at a time."""
    events = make_workload(small_trace(), order, batch=4).events
    for case in (events, one_key_events(events)):
        for slots, per_layer in (([1, 2, 7, 20, 59, 60], False), ([1, 3, 11], True)):
            compiled = miss_curve(eviction(name), case, slots, per_layer=per_layer, engine="fast")
            assert compiled == miss_curve(eviction(name), case, slots, per_layer=per_layer, engine="reference")


def test_a_curve_falls_to_the_compulsory_misses():
    events = make_workload(small_trace()).events
    curve = miss_curve(eviction("lru"), events, [3, 15, 30, 60])
    misses = [point.misses for point in curve]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] == len(np.unique(events.keys))


def test_a_speed_curve_is_a_run_for_every_budget():
    workload = make_workload(small_trace())
    costs = costs_for(workload)
    composition = composition_of(compose_config("simulate", ["system=next_gate", "eviction=arc"]))
    for slots, run in zip([10, 25, 60], speed_curve(composition, workload, costs, [10, 25, 60]), strict=True):
        assert run.peak_slots <= slots
        alone = run_reference(build(composition, workload, slots), workload, costs)
        assert not difference(alone, [], run, [])
