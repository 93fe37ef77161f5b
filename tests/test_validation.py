"""Known errors are reported exactly: runs are made by the simulator on machines whose constants differ by known amounts."""

import json

import numpy as np
import pytest
from measuring import FIFO, LAYERS, PREFETCHING, TRACE, cell_of, machine, measured_on, routing

from real.systems import cell_system
from real.validation.comparison import (
    Divergence,
    anchor_of,
    cell_costs,
    compare_cell,
    decoder_spec,
    divergence,
    first_steps,
    in_order,
    of_bound,
    ranking,
    summary,
)
from sim.costs import with_free_link
from sim.engines import run_engine
from sim.workload import make_workload
from traces.errors import InputError

MACHINE = machine()
EXPERTS_OF_A_STEP = LAYERS * 2


def errors(loop):
    """Return simulated minus measured ns per step, by component."""
    return {part.name: part.simulated_ns - part.measured_ns for part in loop.components}


@pytest.mark.parametrize("parts", [{}, FIFO, PREFETCHING])
def test_the_same_machine_shows_no_error_and_the_same_decisions(parts):
    report = compare_cell(measured_on(MACHINE, cell_of(parts=parts)), TRACE, MACHINE)
    for loop in (report.open_loop, report.closed_loop):
        assert loop.error == 0
        assert errors(loop) == {"compute": 0, "wait": 0, "host": 0, "link_busy": 0}
    assert report.divergence == Divergence(90, 0, 0, None)


def test_slower_attention_is_an_error_of_compute_alone():
    """The machine takes 9 ns longer for each layer's attention than the profile says."""
    run = measured_on(machine(compute__layer_launch_ns=5 + 9), cell_of())
    report = compare_cell(run, TRACE, MACHINE)
    for loop in (report.open_loop, report.closed_loop):
        assert errors(loop) == {"compute": -9 * LAYERS, "wait": 0, "host": 0, "link_busy": 0}
        assert loop.tpot_ns - report.measured_tpot_ns == pytest.approx(-9 * LAYERS)
        share = next(part.error for part in loop.components if part.name == "compute")
        assert share == pytest.approx(-9 * LAYERS / run.marked["total_ns"].mean())


def test_a_slower_read_out_is_an_error_of_the_host_alone():
    report = compare_cell(measured_on(machine(host__readout_ns=11 + 40), cell_of()), TRACE, MACHINE)
    assert errors(report.open_loop) == {"compute": 0, "wait": 0, "host": -40 * LAYERS, "link_busy": 0}


def test_a_link_that_is_slower_than_it_says_is_an_error_of_link_and_wait():
    """Of misses that nothing hides, every ns that a copy takes longer is waited for; an expert is one copy of 192 bytes."""
    cell = cell_of(system="load_on_demand", slots=2, parts={})
    slow = machine(link__h2d=[[100, 1000], [200, 2000], [1200, 12000]])
    quick = machine(link__h2d=[[100, 900], [200, 1800], [1200, 10800]])
    run = measured_on(slow, cell)
    assert run.steps["misses"].eq(EXPERTS_OF_A_STEP).all()
    report = compare_cell(run, TRACE, quick)
    found = errors(report.open_loop)
    assert found == {"compute": 0, "wait": -192 * EXPERTS_OF_A_STEP, "host": 0, "link_busy": -192 * EXPERTS_OF_A_STEP}
    assert report.open_loop == report.closed_loop
    assert report.anchor == "all missing"


def test_open_loop_prices_the_decisions_of_the_log_and_not_the_policy_s():
    """Measured under FIFO; the cell that is simulated says LRU. Only the closed loop is off; the first event is named."""
    run = measured_on(MACHINE, cell_of(slots=8, parts=FIFO))
    report = compare_cell(run._replace(cell=cell_of(slots=8)), TRACE, MACHINE)
    assert report.open_loop.error == 0
    assert report.closed_loop.error != 0
    assert 0 < report.divergence.differing < 90
    differ = report.divergence.first
    cut = [[entry for entry in log if entry[3] < differ] for log in report.logs]
    assert divergence(*cut, events=differ).differing == 0


def test_divergence_counts_events_and_names_the_first():
    executed = [(0, "hit", 1, 0), (0, "miss", 2, 1), (5, "evict", 1, 1), (9, "late_hit", 3, 2), (9, "hit", 4, 3)]
    simulated = [(0, "hit", 1, 0), (0, "miss", 2, 1), (5, "evict", 7, 1), (9, "hit", 3, 2), (9, "hit", 4, 3)]
    assert divergence(executed, simulated, 4) == Divergence(events=4, differing=1, late=1, first=1)


def test_all_resident_costs_what_the_simulator_s_steps_cost_once_all_is_there():
    cell = cell_of(slots=24, preload=True)
    run = measured_on(MACHINE, cell)
    report = compare_cell(run, TRACE, MACHINE)
    assert report.anchor == "all resident"
    assert (report.closed_loop.error, report.divergence.differing) == (0, 0)
    workload = first_steps(make_workload(TRACE, **cell["workload"]), 30)
    free = with_free_link(cell_costs(cell, MACHINE, workload))
    cold, _ = run_engine("reference", lambda: cell_system(cell, workload), workload, free)
    warm = np.flatnonzero(cold.steps.misses == 0)
    warm = warm[(warm >= cell["warmup"]) & (warm < cell["warmup"] + cell["steps"])]
    timed = run.steps.set_index("step")["total_ns"]
    assert len(warm) > 5
    assert [timed[step] for step in warm] == cold.steps.duration[warm].tolist()


def test_another_trace_is_refused():
    with pytest.raises(InputError, match="'cell' was measured on another trace: it has the hash "):
        compare_cell(measured_on(MACHINE, cell_of()), routing(seed=1), MACHINE)


def test_anchors_come_first_and_are_not_ranked():
    cells = [
        cell_of("lru"),
        cell_of("oracle", "clairvoyant"),
        cell_of("resident", slots=24, preload=True),
        cell_of("none", "load_on_demand", 2),
    ]
    reports = in_order([compare_cell(measured_on(MACHINE, cell), TRACE, MACHINE) for cell in cells])
    assert [report.anchor for report in reports] == ["all resident", "all missing", "perfect prefetch", None]
    assert ranking(reports) == (None, None, 0, 0)
    assert anchor_of(cell_of()) is None


def test_ranking_counts_pairs_of_one_group():
    """Three systems in the same order, then the last two exchanged: one pair of three disagrees."""
    report = compare_cell(measured_on(MACHINE, cell_of()), TRACE, MACHINE)

    def ranked(measured, simulated):
        loop = report.closed_loop._replace(tpot_ns=simulated)
        return report._replace(measured_tpot_ns=measured, closed_loop=loop)

    one, two, three = ranked(10, 12), ranked(20, 19), ranked(30, 33)
    assert ranking([one, two, three]).tau == 1
    assert ranking([one, ranked(20, 33), ranked(30, 19)]).tau == pytest.approx(1 / 3)
    assert ranking([ranked(10, 33), ranked(20, 19), ranked(30, 12)]).tau == -1
    assert ranking([one, ranked(20, 12)]).tau == 0
    assert ranking([one, two._replace(group="another budget")]).tau is None


def test_systems_that_the_measurement_cannot_tell_apart_are_not_ranked():
    """10 with passes from 7 to 13 and 20 with passes from 14 to 26: they may be equal; 30 is slower than both."""
    report = compare_cell(measured_on(MACHINE, cell_of()), TRACE, MACHINE)

    def spread(measured, half, simulated):
        loop = report.closed_loop._replace(tpot_ns=simulated)
        return report._replace(measured_tpot_ns=measured, spread_ns=half, closed_loop=loop)

    assert ranking([spread(14, 3, 12), spread(20, 6, 11), spread(40, 1, 33)]) == (pytest.approx(1 / 3), 1, 2, 1)


def test_spread_and_median_come_from_the_passes():
    """Quickest of every step: 10 and 20. Without the first pass 14 and 20, without the second 10 and 30, at most 5 more."""
    run = measured_on(MACHINE, cell_of())
    report = compare_cell(run._replace(pass_ns=((10, 30), (15, 20), (14, 70))), TRACE, MACHINE)
    assert report.spread_ns == (10 + 30) / 2 - (10 + 20) / 2
    assert report.median_tpot_ns == (14 + 30) / 2
    once = compare_cell(run._replace(pass_ns=((10, 30),)), TRACE, MACHINE)
    assert (once.spread_ns, once.median_tpot_ns) == (0, 20)
    never = compare_cell(run, TRACE, MACHINE)
    assert (never.spread_ns, never.median_tpot_ns) == (0, never.measured_tpot_ns)


def test_the_bound_is_the_longer_of_the_resident_step_and_the_link():
    """Resident 100 ns. Of two systems in 10 slots the faster counts; its link needs 192 ns for one expert a step."""
    cells = [cell_of("resident", slots=24, preload=True), cell_of("one"), cell_of("other")]
    runs = [measured_on(MACHINE, cell) for cell in cells]

    def timed(run, ns, loads):
        steps = run.timed["step"].tolist()
        log = [(0, "load", 1, step * LAYERS) for step in steps for _ in range(loads)] + [(0, "load", 2, 0)] * 50
        return run._replace(steps=run.steps.assign(total_ns=ns), log=log, link_bytes_per_s=1e9)

    resident = timed(runs[0], 100, 0)
    assert of_bound([resident, timed(runs[1], 400, 1), timed(runs[2], 500, 2)]) == 192 / 400
    assert of_bound([resident, timed(runs[1], 400, 0)]) == 100 / 400
    assert of_bound([timed(runs[1], 200, 0)]) is None


def test_a_summary_has_worst_and_mean_error_and_null_for_what_was_not_measured():
    slower = machine(compute__layer_launch_ns=5 + 9)
    reports = [
        compare_cell(measured_on(slower, cell_of(name, slots=n)), TRACE, MACHINE) for name, n in (("a", 8), ("b", 16))
    ]
    found = summary(reports)
    shares = [9 * LAYERS / report.measured_tpot_ns for report in reports]
    assert found["mean_error"] == pytest.approx(sum(shares) / 2)
    assert found["worst_error"] == pytest.approx(max(shares))
    assert (found["copy_efficiency"], found["over_best_peer"], found["of_bound"], found["kendall_tau"]) == (
        0.97,
        None,
        None,
        None,
    )
    assert [cell["name"] for cell in found["cells"]] == ["a", "b"]
    json.dumps(found, allow_nan=False)


def test_the_replay_decoder_reads_its_matrices_and_not_its_embedding():
    spec = decoder_spec({**cell_of()["model"], "shared_width": 5})
    assert spec.expert_bytes == {"bf16": 3 * 4 * 8 * 2}
    assert spec.other_bytes == 2 * (3 * (4 * 16 + 8 * 4 + 3 * 5 * 4) + 16 * 4)
    assert spec.kv_bytes_per_token == 3 * 2 * 4 * 2
