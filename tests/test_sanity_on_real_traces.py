"""What must hold on recorded routing, whatever the figures."""

import numpy as np
import pytest

from sim.config import compose_config
from sim.experiment import composition_of, costs_of, run_system, workload_of
from sim.replay import one_pool, pool_per_layer, replay
from sim.workload import make_workload
from traces import bundled, load_trace, take_tokens


@pytest.fixture(scope="module")
def recording():
    """Six requests of the bundled recording, decode only: one token per step."""
    return make_workload(take_tokens(load_trace(bundled()["reference_16x64_top8"]), 960), phases="decode")


@pytest.mark.parametrize(("slots", "hits"), [(100, False), (120, False), (121, True), (160, True)])
def test_global_lru_hits_nothing_up_to_one_cycle_less_a_layer(recording, slots, hits):
    """(L - 1) K = 120 slots of the 16 layers x 8 experts that every token cycles through."""
    config = compose_config("simulate", ["system=lru", "workload.phases=decode", "trace.tokens=960"])
    workload = workload_of(config)
    config["budget"] = slots / 1024
    run, _ = run_system(config, workload, costs_of(config, workload)[0])
    assert run.peak_slots == slots
    assert (int(run.steps.hits.sum()) > 0) is hits
    assert (replay_hits("lru", workload, slots) > 0) is hits


def test_no_eviction_has_fewer_demand_misses_than_belady(recording):
    found = {name: replay_hits(name, recording, 256) for name in ("lru", "lfu", "lrfu", "arc", "s3fifo", "sieve", "belady")}
    assert max(found, key=found.get) == "belady"


def test_more_slots_never_hurt_lru_or_belady(recording):
    """Both are stack algorithms while every event fits."""
    for name in ("lru", "belady"):
        hits = [replay_hits(name, recording, slots, per_layer=True) for slots in (8, 12, 16, 24, 32, 48, 64)]
        assert hits == sorted(hits)
        assert hits[-1] == len(recording.events.keys) - len(np.unique(recording.events.keys))


def replay_hits(name, workload, slots, per_layer=False):
    from sim.events import future_of

    cls, parameters = composition_of(compose_config("simulate", [f"eviction={name}"])).parts["eviction"]
    arrange = pool_per_layer if per_layer else one_pool
    setting = arrange(workload.events, slots, future_of(workload.events))
    return replay(cls.build(setting, **parameters), setting, workload.events).hits
