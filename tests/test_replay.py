"""Replay on the CPU stand-in: outputs that no system changes, plain arrays that equal the simulator's, and the command."""

# ruff: noqa: E402  # what must be there comes first

import importlib
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


def test_the_command_writes_results_as_it_goes_and_reports_what_failed(trace_path, tmp_path, monkeypatch):
    good = cell_of(trace_path, slots=12)
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([vars(good), vars(replace(good, name="bad"))]))

    def fail_the_bad(cell, *arguments):
        if cell.name == "bad":
            raise InputError("a copy failed")
        return run_cell(cell, *arguments)

    monkeypatch.setattr("real.replay.run_cell", fail_the_bad)
    assert main([str(path), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 1
    rows = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["lru", "bad"]
    assert rows[1]["error"] == "pass 1 of 1: a copy failed"
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


def without(entry, name):
    return {field: value for field, value in entry.items() if field != name}


def with_part(entry, part, **changes):
    return {**entry, part: {**entry[part], **changes}}


WRONG = {
    "unknown field": (lambda cell: [{**cell, "slot": 3}], "cell 0 ('lru') has no field 'slot': did you mean 'slots'?"),
    "missing field": (lambda cell: [without(cell, "seed")], "cell 0 ('lru'): seed is missing"),
    "text": (lambda cell: [{**cell, "slots": "many"}], "cell 0 ('lru'): slots is 'many': it must be a whole number of at"),
    "size": (lambda cell: [with_part(cell, "model", hidden=-1)], "cell 0 ('lru'): model.hidden is -1: it must be a whole"),
    "switch": (lambda cell: [{**cell, "preload": 1}], "cell 0 ('lru'): preload is 1: it must be true or false"),
    "heads": (lambda cell: [with_part(cell, "model", heads=3)], "cell 0 ('lru'): model.heads is 3, which does not divide"),
    "no object": (lambda cell: [cell, 7], "cell 1 is 7: it must be an object with the fields of a cell"),
    "same name": (lambda cell: [cell, cell], "cell 1: name is 'lru', as cell 0 is called"),
    "too long": (
        lambda cell: [{**cell, "steps": 10**6}],
        "cell 0 ('lru'): warmup, steps and marked make 1000003 steps, but",
    ),
    "no trace": (lambda cell: [cell, {**cell, "name": "b", "trace": "no.safetensors"}], "cell 1 ('b'): "),
    "other shape": (lambda cell: [with_part(cell, "model", experts=9)], "cell 0 ('lru'): model.experts is 9, but "),
    "policy": (lambda cell: [with_part(cell, "system", miss={"_target_": "policies.x.Y"})], "cell 0 ('lru'): miss._target_"),
    "too few slots": (lambda cell: [{**cell, "slots": 1}], "cell 0 ('lru'): budget gives 1 expert slots"),
    "unknown workload": (lambda cell: [with_part(cell, "workload", order="x")], "cell 0 ('lru'): workload.order is 'x'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_cell_is_one_sentence_before_anything_runs(what, trace_path, tmp_path, capsys):
    made, sentence = WRONG[what]
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(made(vars(cell_of(trace_path, slots=12)))))
    assert main([str(path), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{path}: {sentence}")
    assert (captured.out, captured.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [path])


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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, ": No such file or directory"),
        ("[", ": not JSON: "),
        ("{}", " is of JSON's type dict: it must be a list of cells, at least one"),
        ("[]", " is an empty list: it must be a list of cells, at least one"),
    ],
)
def test_a_file_that_holds_no_cells_is_one_sentence(content, sentence, tmp_path, capsys):
    path = tmp_path / "cells.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"{path}{sentence}")


def test_results_do_not_go_into_a_file(trace_path, tmp_path, capsys):
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([vars(cell_of(trace_path, slots=12))]))
    assert main([str(path), "--out", str(path), "--where", "cpu"]) == 2
    assert capsys.readouterr().err == f"--out is '{path}': it must be a folder, or one that can be made: File exists\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["selftest", "identity"])
def test_without_a_gpu_a_check_says_what_does_without(module, capsys):
    if module == "identity":
        pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")
    assert importlib.import_module(f"real.{module}").main([]) == 2
    sentence = "there is no GPU that torch can use; --where cpu runs the same code on a stand-in, which times nothing\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(("answer", "status"), [(2, 1), (0, 0), (KeyboardInterrupt, 130)])
def test_the_identity_checks_status_is_no_count(answer, status, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")
    import real.identity

    checked = []

    def check_all(where, say, architectures):
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        checked.extend(architectures)
        return [{"error": "no"}] * answer

    monkeypatch.setattr(real.identity, "check_all", check_all)
    assert real.identity.main(["--where", "cpu", "--only", "olmoe,mixtral", "gpt_oss"]) == status
    assert checked == ([] if status == 130 else ["olmoe", "mixtral", "gpt_oss"])
    assert (status == 130) == capsys.readouterr().err.startswith("interrupted")
    assert real.identity.main(["--where", "cpu", "--only", "olmo"]) == 2
    assert "--only: 'olmo' is no architecture that is checked: did you mean 'olmoe'?" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "status"), [(["a", "b"], 1), ([], 0), (KeyboardInterrupt, 130)])
def test_the_self_tests_status_is_no_count(answer, status, monkeypatch, capsys):
    def run(where):
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr("real.selftest.run", run)
    assert importlib.import_module("real.selftest").main(["--where", "cpu"]) == status
    assert (status == 130) == capsys.readouterr().err.startswith("interrupted")


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
