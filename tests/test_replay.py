"""Replay on the CPU stand-in: outputs that no system changes, plain arrays that equal the simulator's, and the command."""

# ruff: noqa: E402  # what must be there comes first

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from policies.contract import NEVER, Future

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")

from policies.system import AXES
from real.decoder import ModelShape
from real.replay import Cell, Measured, Model, main, merged, run_cell
from real.routing import replay_inputs
from real.schedule import Schedule
from real.standin import StandIn
from sim.config import compose_config
from sim.conformance import small_trace
from sim.events import Events
from sim.workload import make_workload
from traces import save_trace
from traces.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

TRACE = small_trace()
SHAPE = ModelShape(
    TRACE.model.layers,
    TRACE.model.experts,
    TRACE.model.top_k,
    hidden=32,
    expert_width=16,
    shared_width=8,
    heads=2,
    vocabulary=50,
)
ALL = SHAPE.layers * SHAPE.experts


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "small.safetensors"
    save_trace(TRACE, path)
    return path


@pytest.fixture(scope="module")
def model():
    made = Model(SHAPE, "cpu")
    yield made
    made.close()


def cell_of(trace, system="lru", slots=ALL, order="one_request", batch=1, steps=20, **changes):
    config = compose_config("simulate", [f"system={system}"])
    parts = {axis: config[axis] for axis in AXES}
    flags = {name: config[name] for name in ("drop_unused_prefetches", "reupload_after_use")}
    return Cell(
        name=system,
        trace=str(trace),
        workload={"order": order, "batch": batch, "phases": "all"},
        model=SHAPE._asdict(),
        system={"name": system, **flags, **parts},
        slots=slots,
        warmup=1,
        steps=steps - 3,
        marked=2,
        seed=0,
        layer_ns=1000,
        transfer_ns=500,
        chunk_bytes=1000,
        window_bytes=2000,
        **changes,
    )


@pytest.mark.parametrize(("order", "batch"), [("one_request", 1), ("continuous", 3)])
@pytest.mark.parametrize("system", ["lru", "load_on_demand", "next_gate", "fate_released", "clairvoyant"])
def test_no_system_changes_a_bit_of_the_output(trace_path, model, system, order, batch):
    resident = run_cell(cell_of(trace_path, order=order, batch=batch, preload=True), model)
    slots = 40 if system.startswith("fate") else 12
    offloaded = run_cell(
        cell_of(trace_path, system, slots, order, batch),
        model,
        StandIn("random", seed=3, schedule=Schedule(SHAPE.expert_bytes)),
    )
    assert resident.row["misses"] == [0] * 20
    assert sum(offloaded.row["misses"]) > 0
    np.testing.assert_array_equal(resident.checksums, offloaded.checksums)
    np.testing.assert_array_equal(resident.chosen, offloaded.chosen)
    assert len(np.unique(resident.checksums)) == 20


def test_a_row_says_where_time_and_bytes_went(trace_path, model):
    row = run_cell(cell_of(trace_path, slots=12), model).row
    assert len(row["step_ns"]) == 17
    assert len(row["marked_ns"]["compute"]) == 2
    assert row["bytes_sent"] == row["bytes_by_kind"]["demand"] == sum(row["misses"]) * SHAPE.expert_bytes
    assert row["peak_slots"] == 12
    for name in ("attention", "experts", "head"):
        assert min(row["marked_ns"][name]) > 0


def plain_events(workload):
    """Return `Workload.events`, without compiled code."""
    trace, expert_count = workload.trace, workload.trace.model.experts
    offsets = [0]
    keys, tokens = [], []
    for start, stop in pairwise(workload.offsets.tolist()):
        routed = trace.experts[workload.rows[start:stop]]
        for layer in range(trace.model.layers):
            uses = {}
            for expert in routed[:, layer].ravel().tolist():
                if expert >= 0:
                    uses[layer * expert_count + expert] = uses.get(layer * expert_count + expert, 0) + 1
            keys += uses
            tokens += uses.values()
            offsets.append(len(keys))
    return Events(
        trace.model.layers, expert_count, np.array(offsets, np.int64), np.array(keys, np.int32), np.array(tokens, np.int32)
    )


def plain_future(events):
    """Return `Workload.future` of `events`, without compiled code."""
    following = np.full(len(events.keys), NEVER, np.int64)
    first = np.full(events.layers * events.experts, NEVER, np.int64)
    for event in reversed(range(events.total)):
        for place in range(events.offsets[event], events.offsets[event + 1]):
            key = events.keys[place]
            following[place] = first[key]
            first[key] = event
    return Future(events.offsets, events.keys, following, first)


@pytest.mark.parametrize(("order", "batch"), [("one_request", 1), ("recorded", 1), ("continuous", 3)])
def test_plain_arrays_equal_what_simulator_and_executor_use(order, batch):
    workload = make_workload(TRACE, order, batch)
    events = plain_events(workload)
    for plain, compiled in zip(events[2:], workload.events[2:], strict=True):
        np.testing.assert_array_equal(plain, compiled)
    for plain, compiled in zip(plain_future(events), workload.future, strict=True):
        np.testing.assert_array_equal(plain, compiled)


def test_a_lane_holds_one_request_at_a_time():
    workload = make_workload(TRACE, "continuous", 3)
    inputs = replay_inputs(workload)
    assert inputs.lane_count <= 4
    for segments in inputs.segments:
        lanes = [segment.lane for segment in segments]
        assert len(set(lanes)) == len(lanes)


def test_the_command_writes_results_as_it_goes_and_reports_what_failed(trace_path, tmp_path, capsys):
    good, bad = cell_of(trace_path, slots=12), replace(cell_of(trace_path, slots=12), name="too long", steps=10**6)
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([vars(good), vars(bad)]))
    assert main([str(path), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 1
    rows = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["lru", "too long"]
    assert "asks for 1000003 steps" in rows[1]["error"]
    assert rows[0]["driver"] is None  # a stand-in has none
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "decisions.jsonl.gz",
        "results.jsonl",
        "stamps.jsonl.gz",
    ]


def test_a_cell_that_fails_in_a_later_pass_has_failed(trace_path, tmp_path, monkeypatch, capsys):
    cells = [replace(cell_of(trace_path, slots=12), name=name, passes=3) for name in ("one", "other")]
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([vars(cell) for cell in cells]))
    ran = []

    def fail_in_the_second_pass(cell, *arguments):
        ran.append(cell.name)
        if ran[-1] == "one" and ran.count("one") == 2:
            raise InputError("no more")
        return run_cell(cell, *arguments)

    monkeypatch.setattr("real.replay.run_cell", fail_in_the_second_pass)
    assert main([str(path), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 1
    rows = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert ran == ["one", "other", "one", "other", "other"]
    assert rows[0] == {"cell": "one", "error": "pass 2 of 3: no more"}
    assert (rows[1]["cell"], len(rows[1]["pass_ns"])) == ("other", 3)
    assert "one: pass 2 of 3: no more" in capsys.readouterr().out


def test_passes_are_merged_into_the_quickest_of_every_step_and_the_rest_of_the_quietest():
    """The second one is the quietest as a whole, though not in every step; the link was at its best in the third."""

    def one(name, step_ns, rate, burst):
        row = {"step_ns": step_ns, "link_bytes_per_s": rate, "marked_ns": {"burst_bytes_per_s": burst}, "copy_efficiency": 9}
        return Measured({**row, "cell": name}, [name], name, name, name)

    passes = [one("a", [10, 30, 20], 30.0, 1.0), one("b", [9, 31, 13], 20.0, 16.0), one("c", [12, 11, 40], 40.0, 1.0)]
    found = merged(passes)
    assert (found.row["cell"], found.log, found.timeline, found.chosen, found.checksums) == ("b", ["b"], "b", "b", "b")
    assert found.row["step_ns"] == [9, 11, 13]
    assert found.row["pass_ns"] == [[10, 30, 20], [9, 31, 13], [12, 11, 40]]
    assert (found.row["step_ns_median"], found.row["step_ns_mean"]) == (11, 11)
    assert (found.row["link_bytes_per_s"], found.row["copy_efficiency"]) == (40, 0.4)
    assert passes[1].row["step_ns"] == [9, 31, 13]


def test_a_field_that_a_cell_does_not_have_is_named(tmp_path, capsys):
    path = tmp_path / "cells.json"
    path.write_text('[{"slot": 3}]')
    assert main([str(path), "--out", str(tmp_path), "--where", "cpu"]) == 2
    assert "cell 0 has no field 'slot': did you mean 'slots'?" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_host_memory(trace_path, monkeypatch):
    made = Model(SHAPE, "cpu")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell_of(trace_path, slots=12), made)
    made.close()
    assert made.slab.blocks.size == 0


def test_memory_that_cannot_be_registered_is_released_again():
    from real.slab import HostSlab

    registered = []

    def register(address, size):
        if registered:
            raise InputError("no more")
        registered.append(address)

    import real.slab

    piece, real.slab.PIECE_BYTES = real.slab.PIECE_BYTES, 4096
    try:
        with pytest.raises(InputError, match="no more"):
            HostSlab(3, 4000, register, registered.remove)
    finally:
        real.slab.PIECE_BYTES = piece
    assert registered == []


def test_the_self_test_finds_nothing_wrong_and_would_say_so(trace_path, tmp_path):
    from real import selftest

    path = tmp_path / "routing.safetensors"
    save_trace(selftest._routing(), path)
    made = Model(selftest.SHAPE, "cpu")
    checks = dict(selftest._checks(path, made))
    checks["lru, continuous, batch 3, all"]()
    checks["an interrupted run"]()
    resident = selftest._cell(path, selftest._systems()[0][0], 64, "one_request", 1, "all")
    with pytest.raises(AssertionError, match="nothing was missing"):
        selftest._equals_resident(replace(resident, preload=True), made)
    made.close()
