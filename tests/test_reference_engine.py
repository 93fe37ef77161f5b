"""The memory model, computed by hand on a device of round numbers."""

import numpy as np
import pytest
from builders import make_trace

from policies.system import Composition, build_system, find_part
from sim.conformance import build, costs_for, run_logged, small_trace
from sim.costs import Costs, with_free_link
from sim.events import future_of
from sim.reference import run_reference
from sim.replay import replay
from sim.workload import make_workload

PARTS = {
    "predictor": {"_target_": "policies.predictor.none.NoPrediction"},
    "prefetch": {"_target_": "policies.prefetch.none.NoPrefetch"},
    "eviction": {"_target_": "policies.eviction.lru.LRU"},
    "allocation": {"_target_": "policies.allocation.whole_device.WholeDevice"},
    "miss": {"_target_": "policies.miss.wait.Wait"},
}
ORACLE = {"_target_": "policies.predictor.oracle.Oracle"}
BELADY = {"_target_": "policies.eviction.belady.Belady"}


def top_n(n=None, depth=1):
    return {"_target_": "policies.prefetch.top_n.TopN", "n": n, "depth": depth}


def composition(drop=False, reupload=False, **parts):
    chosen = {axis: find_part(axis, spec) for axis, spec in {**PARTS, **parts}.items()}
    return Composition("tried", chosen, drop, reupload)


def costs(steps, chunks=1):
    """Gate 100, read-out 7, issue 10 and 20, experts 50 each, 1000 per expert on the link (in equal chunks)."""
    return Costs(
        host_gate_ns=10,
        host_experts_ns=20,
        host_step_ns=5,
        readout_ns=7,
        step_ns=np.full(steps, 3),
        attention_ns=np.full(steps, 100),
        expert_ns=np.array([0, 50, 60]),
        chunks=chunks,
        chunk_ns=1000 // chunks,
        last_chunk_ns=1000 // chunks,
        expert_bytes=800,
        chunk_bytes=800 // chunks,
    )


def run(experts, slots, chunks=1, lookahead=None, drop=False, reupload=False, terms=None, **parts):
    """Run decode steps of one token each; `experts` [S, L, K] of 8 experts per layer, `terms` costs to replace."""
    trace = make_trace(experts, expert_count=8, lookahead=lookahead)
    workload = make_workload(trace, "one_request")
    steps, layers, top_k = np.shape(experts)
    system = build_system(
        composition(drop, reupload, **parts),
        slots=slots,
        layers=layers,
        experts=8,
        top_k=top_k,
        future=lambda: future_of(workload.events),
    )
    log = []
    return run_reference(system, workload, costs(steps, chunks)._replace(**(terms or {})), log), log


def test_one_miss():
    """Gate until 100, known at 107, load until 1107, expert until 1157, head until 1160."""
    result, log = run([[[0]]], slots=1)
    assert result.end_ns == 1160
    assert [part.tolist() for part in result.steps] == [[153], [980], [27], [0], [0], [1]]
    assert log == [(107, "miss", 0, 0), (107, "load", 0, 0), (1107, "landed", 0, 0)]
    assert result.link_busy_ns == 1000
    assert result.bytes_by_kind == {"demand": 800, "useful": 0, "late": 0, "wasted": 0, "refresh": 0}


def test_one_hit():
    """The second step issues its gate at 1160; nothing is waited for: 100 + 7 + 20 + 50 + 3."""
    result, _ = run([[[0]], [[0]]], slots=1)
    assert result.steps.duration.tolist() == [1160, 180]
    assert result.steps.wait.tolist() == [980, 0]
    assert result.steps.hits.tolist() == [0, 1]


def test_host_binds_when_issuing_outlasts_compute():
    """A host that needs 500 to issue a gate ends the gate at 500."""
    workload = make_workload(make_trace([[[0]]], expert_count=4), "one_request")
    system = build_system(composition(), slots=1, layers=1, experts=4, top_k=1)
    slow = costs(1)._replace(host_gate_ns=500)
    result = run_reference(system, workload, with_free_link(slow))
    assert result.end_ns == 500 + 7 + 20 + 50 + 3
    assert [part.tolist() for part in result.steps[:3]] == [[153], [0], [427]]


def test_experts_compute_as_they_land():
    """Resident 0 computes first; 1 lands at 1107 + t, 2 a thousand later, each computes 50."""
    result, log = run([[[0, 1, 2]]], slots=3)
    assert [entry for entry in log if entry[1] == "landed"] == [
        (1107, "landed", 0, 0),
        (2107, "landed", 1, 0),
        (3107, "landed", 2, 0),
    ]
    assert result.end_ns == 3107 + 50 + 3
    assert result.steps.wait.tolist() == [980 + 950 + 950]


def test_an_idle_link_needs_a_start_and_a_busy_one_does_not():
    """The link starts at 107 for 30; the third expert waits for nothing but the second. The next layer finds it idle."""
    result, log = run([[[0, 1], [2, 3]]], slots=4, terms={"link_start_ns": 30})
    assert [(ns, key) for ns, what, key, _ in log if what == "load"] == [(107, 0), (1137, 1), (2294, 10), (3324, 11)]
    assert [(ns, key) for ns, what, key, _ in log if what == "landed"] == [(1137, 0), (2137, 1), (3324, 10), (4324, 11)]
    assert result.link_busy_ns == 2 * (30 + 2 * 1000)


def test_a_prefetch_behind_a_demand_needs_no_start():
    """Layer 1's expert follows layer 0's at 1137; the link is busy from 107 on without a pause."""
    result, log = run([[[0], [1]]], slots=2, predictor=ORACLE, prefetch=top_n(), terms={"link_start_ns": 30})
    assert [entry for entry in log if entry[1] in ("prefetch", "landed")] == [
        (1137, "landed", 0, 0),
        (1137, "prefetch", 9, 0),
        (2137, "landed", 9, 1),
    ]
    assert result.link_busy_ns == 2030


def test_a_demand_waits_for_the_first_chunk_of_a_prefetch_that_has_just_woken_the_link():
    """13 starts alone at 107 with 500 more for its first chunk, until 707; the demand for 9 comes at 284."""
    lookahead = [[[[-1]], [[-1]]], [[[5]], [[-1]]]]
    terms = {"link_start_ns": 500}
    result, log = run([[[0], [0]], [[0], [1]]], 4, 10, lookahead, predictor=GATE, prefetch=top_n(), terms=terms)
    prefetch = next(ns for ns, what, key, _ in log if (what, key) == ("prefetch", 13))
    miss = next(ns for ns, what, key, _ in log if (what, key) == ("miss", 9))
    landed = next(ns for ns, what, key, _ in log if (what, key) == ("landed", 9))
    assert (miss - prefetch, landed - prefetch) == (177, 500 + 100 + 1000)
    assert result.bytes_by_kind["wasted"] == 80


def test_a_host_that_reads_the_outcome_of_a_step_starts_the_next_one_after_it():
    """The first step ends at 1160; 40 later the host issues the next gate, which ends at 1300."""
    result, _ = run([[[0]], [[0]]], slots=1, terms={"step_readout_ns": 40})
    assert result.steps.duration.tolist() == [1160, 180 + 40]
    assert result.steps.host.tolist() == [27, 67]


def test_residents_are_one_group_and_each_arrival_another():
    """107 known, 127 issued. Two misses land at 1107 and 2107; in the next step both are there."""
    result, _ = run([[[0, 1]], [[0, 1]]], slots=2, terms={"group_ns": 9})
    assert result.steps.compute.tolist() == [100 + 2 * (9 + 50) + 3, 100 + 9 + 2 * 50 + 3]


def test_a_demand_crosses_in_one_copy():
    result, log = run([[[0]]], slots=1, chunks=10, terms={"demand_ns": (0, *range(91, 1000, 91))})
    assert [ns for ns, what, *_ in log if what == "landed"] == [107 + 910]
    assert result.link_busy_ns == 910


def test_shared_experts_run_while_the_host_decides():
    """The gate ends at 100, its shared experts at 140; the host has issued at 127."""
    hits = [[[0]], [[0]]]
    result, _ = run(hits, slots=1, terms={"shared_ns": 40})
    assert result.steps.compute.tolist() == [100 + 40 + 50 + 3] * 2
    assert result.steps.host.tolist()[1] == 0
    assert run(hits, slots=1)[0].steps.host.tolist()[1] == 27


def test_the_link_waits_for_the_host_and_residents_do_not():
    """Known at 107: the demand starts at 147, the resident of the second step is computed from 127 on as before."""
    result, log = run([[[0]], [[0]]], slots=1, terms={"host_demand_ns": 40})
    assert [ns for ns, what, *_ in log if what == "load"] == [147]
    assert result.steps.duration.tolist()[1] == run([[[0]], [[0]]], slots=1)[0].steps.duration.tolist()[1]


def test_looking_ahead_keeps_the_host_from_the_next_gate():
    """Of layer 0 only, since layer 1 of the only step is the last event: the next gate is issued 400 later."""
    free = run([[[0], [1]]], slots=2, predictor=ORACLE, prefetch=top_n())[0]
    busy = run([[[0], [1]]], slots=2, predictor=ORACLE, prefetch=top_n(), terms={"host_ahead_ns": 2000})[0]
    assert busy.end_ns > free.end_ns


def test_kernels_are_slower_beside_a_link_that_moves():
    """Attention of layer 1 runs beside the prefetch for it: 100 + 7. What lands last does not, for the link is idle then."""
    result, _ = run([[[0], [1]]], slots=2, predictor=ORACLE, prefetch=top_n(), terms={"beside_ns": 7})
    assert result.steps.compute.tolist() == [100 + (50 + 7) + (100 + 7) + 50 + 3]


def test_a_prefetch_gives_way_only_after_the_chunks_that_the_copy_engine_has():
    """As in the test above with 10 chunks of 100: the demand for 9 waits for one chunk more for each that is committed."""
    lookahead = [[[[-1]], [[-1]]], [[[5]], [[-1]]]]
    landed = {}
    for committed in (0, 2):
        terms = {"committed_chunks": committed}
        _, log = run([[[0], [0]], [[0], [1]]], 4, 10, lookahead, predictor=GATE, prefetch=top_n(), terms=terms)
        landed[committed] = next(ns for ns, what, key, _ in log if (what, key) == ("landed", 9))
    assert landed[2] - landed[0] == 200


def test_prefetch_hides_what_compute_covers():
    """The oracle's load of layer 1 starts when layer 0's own has landed, and is late by what layer 0 does not cover."""
    result, log = run([[[0], [1]]], slots=2, predictor=ORACLE, prefetch=top_n())
    assert (1107, "prefetch", 9, 0) in log
    assert (1264, "late_hit", 9, 1) in log  # gate of layer 1: 1157 + 100 + 7
    assert (2107, "landed", 9, 1) in log
    assert result.end_ns == 2107 + 50 + 3
    assert result.bytes_by_kind == {"demand": 800, "useful": 0, "late": 800, "wasted": 0, "refresh": 0}
    assert (result.predicted, result.predicted_and_needed, result.needed_after_prediction) == (1, 1, 1)


GATE = {"_target_": "policies.predictor.cross_layer_gate.CrossLayerGate"}


@pytest.mark.parametrize(("chunks", "lands", "wasted"), [(1, 3107, 800), (10, 2307, 160)])
def test_a_demand_takes_the_link_from_a_wrong_prefetch_at_the_end_of_a_chunk(chunks, lands, wasted):
    """The prefetch of 13 starts at 1107; the demand for 9 comes at 1264 and waits for a chunk's end: 2107 or 1307."""
    lookahead = [[[[5]], [[-1]]]]
    result, log = run([[[0], [1]]], 3, chunks, lookahead, predictor=GATE, prefetch=top_n())
    assert (1107, "prefetch", 13, 0) in log
    assert (1264, "miss", 9, 1) in log
    assert (lands, "landed", 9, 1) in log
    assert result.end_ns == lands + 50 + 3
    assert result.bytes_by_kind["wasted"] == wasted
    assert result.link_busy_ns == lands - 107


def test_a_prefetch_that_gave_way_goes_on_where_it_stopped():
    """20, wanted by layer 2, has moved two of ten chunks when 9 comes first; the other eight follow from 2307 on."""
    lookahead = [[[[-1], [4]], [[-1], [-1]], [[-1], [-1]]]]
    result, log = run([[[0], [1], [4]]], 3, 10, lookahead, predictor=GATE, prefetch=top_n(depth=2))
    assert (1107, "prefetch", 20, 0) in log
    assert (2307, "landed", 9, 1) in log
    assert (2464, "late_hit", 20, 2) in log
    assert (3107, "landed", 20, 2) in log
    assert result.end_ns == 3107 + 50 + 3
    assert result.bytes_by_kind == {"demand": 1600, "useful": 0, "late": 800, "wasted": 0, "refresh": 0}


def test_a_system_may_drop_prefetches_that_its_event_did_not_use():
    """Two layers twice: the wrong prefetch leaves when its event is over, or stays until something else needs the slot."""
    lookahead = [[[[5]], [[-1]]]] * 2
    experts = [[[0], [1]]] * 2
    _, kept = run(experts, 3, 1, lookahead, predictor=GATE, prefetch=top_n())
    _, dropped = run(experts, 3, 1, lookahead, drop=True, predictor=GATE, prefetch=top_n())
    assert [entry[2] for entry in kept if entry[1] == "prefetch"] == [13]
    assert [entry[2] for entry in kept if entry[1] == "evict"] == []
    assert [entry[2] for entry in dropped if entry[1] == "evict"] == [13]
    assert [entry[2] for entry in dropped if entry[1] == "prefetch"] == [13, 13]  # gone, so it is fetched again


def test_an_event_that_needs_more_than_the_slots_runs_in_waves():
    """A prompt of two tokens needs four experts of one layer on two slots: two waves, nothing lost."""
    trace = make_trace([[[0, 1]], [[2, 3]]], expert_count=4, steps=[0, 0], prompts=[2])
    workload = make_workload(trace, "one_request")
    system = build_system(composition(), slots=2, layers=1, experts=4, top_k=2)
    log = []
    result = run_reference(system, workload, costs(1), log)
    assert result.steps.misses.tolist() == [4]
    assert [(ns, what, key) for ns, what, key, _ in log if what in ("load", "evict")] == [
        (107, "load", 0),
        (1107, "load", 1),
        (2157, "evict", 0),  # the first wave is computed 50 after its last expert landed
        (2157, "load", 2),
        (3157, "evict", 1),
        (3157, "load", 3),
    ]
    assert result.end_ns == 4157 + 50 + 3
    assert result.peak_slots == 2


def test_free_link_and_perfect_prediction_leave_no_wait():
    workload = make_workload(small_trace(), "one_request")
    perfect = composition(predictor=ORACLE, prefetch=top_n())
    result = run_reference(build(perfect, workload, 20), workload, with_free_link(costs_for(workload)))
    assert int(result.steps.wait.sum()) == 0


def test_prefetch_alone_gains_at_most_twofold():
    """max(C, X) <= T <= C + X: without prefetch T is at most C + X, with it at least the larger of the two."""
    workload = make_workload(small_trace(), "one_request")
    alone, _ = run_logged(composition(), workload, 20)
    perfect, _ = run_logged(composition(predictor=ORACLE, prefetch=top_n(depth=5), eviction=BELADY), workload, 20)
    compute = int((alone.steps.compute + alone.steps.host).sum())
    assert max(compute, alone.link_busy_ns) <= alone.end_ns <= compute + alone.link_busy_ns
    assert perfect.end_ns >= max(compute, perfect.link_busy_ns)
    assert alone.end_ns <= 2 * max(compute, alone.link_busy_ns)


def test_all_experts_fit_leaves_compulsory_misses():
    workload = make_workload(small_trace(), "one_request")
    result, _ = run_logged(composition(), workload, 5 * 12)
    assert int(result.steps.misses.sum()) == len(np.unique(workload.events.keys))


@pytest.mark.parametrize(
    "policy", ["lru.LRU", "fifo.FIFO", "lfu.LFU", "lrfu.LRFU", "arc.ARC", "belady.Belady", "sieve.Sieve"]
)
@pytest.mark.parametrize("slots", [18, 30, 45])
def test_timed_and_untimed_misses_agree_while_the_union_fits(policy, slots):
    workload = make_workload(small_trace(), "one_request", phases="decode")
    tried = composition(eviction={"_target_": f"policies.eviction.{policy}"})
    timed, _ = run_logged(tried, workload, slots)
    system = build(tried, workload, slots)
    untimed = replay(system.eviction, system.setting, workload.events)
    assert int(timed.steps.misses.sum()) == untimed.misses


def test_reupload_after_use_makes_every_use_cost_a_transfer():
    """Fate's released code: a resident expert is late until its copy is renewed."""
    result, log = run([[[0]], [[0]], [[0]]], slots=1, reupload=True)
    assert result.steps.hits.tolist() == [0, 0, 0]
    assert result.steps.late_hits.tolist() == [0, 1, 1]
    assert result.bytes_by_kind["refresh"] == 1600
    assert [what for _, what, _, _ in log].count("refresh") == 3  # the last one is under way at the end
