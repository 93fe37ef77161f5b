"""A measured run comes back as it was written; whatever does not fit together is refused in one sentence."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from measuring import SHAPE, cell_of, machine, measured_on

from real.timeline import HOST_PARTS, MARKS
from real.validation.measured import from_replay, read_folder, read_measured, replay_results, write_measured
from sim.reference import Span
from traces.errors import InputError

RUN = measured_on(machine(), cell_of())


@pytest.fixture
def path(tmp_path):
    return write_measured(tmp_path, RUN)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(path, cell=None):
    with pytest.raises(InputError) as error:
        read_measured(path, cell)
    sentence = str(error.value)
    assert sentence.startswith(str(path.with_suffix("")))
    return sentence.partition(": ")[2]


def test_a_run_comes_back_as_it_was_written(path, tmp_path):
    found = read_measured(path, RUN.cell)
    pd.testing.assert_frame_equal(found.steps, RUN.steps)
    assert found._replace(steps=None) == RUN._replace(steps=None)
    assert [run.name for run in read_folder(tmp_path)] == ["cell"]
    files = ["cell.json", "cell.log.json.gz", "cell.parquet", "cell.spans.json.gz"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files


def test_timed_and_marked_steps_are_told_apart():
    assert RUN.timed["step"].tolist() == list(range(4, 22))
    assert RUN.marked["step"].tolist() == list(range(22, 30))


def test_a_cell_that_was_changed_is_not_to_be_believed(path):
    change(path, cell={**RUN.cell, "slots": 11})
    assert refusal(path) == "the cell does not have the hash that the file states: it was changed after the run"


def test_another_cell_than_the_present_one_is_refused(path):
    assert refusal(path, {**RUN.cell, "slots": 11}) == (
        "this is a measurement of another cell than 'cell' as it is configured now"
    )
    assert read_measured(path, {**RUN.cell, "trace": "elsewhere/routing.safetensors"}).name == "cell"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"format": "foregate.measured.0"}, "not a measured run of the format foregate.measured.4"),
        ({"device": 7}, "device is 7"),
        ({"extra": 1}, "extra is no field of a measured run"),
        ({"bytes_by_kind": {"demand": 1}}, "bytes_by_kind must be those of demand, useful, late, wasted, refresh"),
        (
            {"host_per_layer_ns": {"await_gate": {"median": 2, "p10": 1, "p90": 3}}},
            "host_per_layer_ns must have median, p10 and p90 of issue_gate, look_ahead, await_gate, decide_and_feed, "
            "issue_experts, between_layers",
        ),
        (
            {"host_per_layer_ns": {part: {"median": 2, "p10": 3, "p90": 3} for part in HOST_PARTS}},
            "host_per_layer_ns must have median, p10 and p90 of issue_gate, look_ahead, await_gate, decide_and_feed, "
            "issue_experts, between_layers",
        ),
        ({"decisions_digest": "0"}, "the decisions do not have the digest that the file states"),
    ],
)
def test_fields_that_are_wrong(path, fields, sentence):
    change(path, **fields)
    assert refusal(path) == sentence


def test_a_field_that_is_missing(path):
    fields = json.loads(path.read_text())
    del fields["driver"]
    path.write_text(json.dumps(fields))
    assert refusal(path) == "driver is missing"


def test_damaged_files(path):
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    assert refusal(path) == "not a whole Parquet file"
    path.with_suffix(".log.json.gz").write_bytes(gzip.compress(b"[]")[:-3])
    assert refusal(path) == "not a whole log"
    path.with_suffix(".log.json.gz").unlink()
    assert refusal(path) == "No such file or directory"
    path.write_text("{")
    assert refusal(path).startswith("not JSON: ")


def changed_steps(**columns):
    steps = RUN.steps.copy()
    for name, value in columns.items():
        steps.loc[20, name] = value
    return steps


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"step": 3}, "the cell asks for steps 4 to 29, and others were measured"),
        ({"total_ns": 1}, "compute, wait and host do not add up to the total"),
        (
            {"link_busy_ns": pd.NA},
            "compute, wait, host and link must be there in the 8 marked steps and nowhere else",
        ),
        ({"link_busy_ns": -1}, "a time or a count is below what is possible"),
        ({"hits": 99}, "hits are not those of the decisions"),
    ],
)
def test_steps_that_contradict_the_rest(tmp_path, columns, sentence):
    assert refusal(write_measured(tmp_path, RUN._replace(steps=changed_steps(**columns)))) == sentence


def spans_of_steps(steps, **changes):
    """Return spans of RUN that add up in `steps`, a span of compute and one of waiting in each, but for `changes`."""
    found = []
    for step in steps:
        parts = {name: int(RUN.steps.set_index("step").loc[step, f"{name}_ns"]) for name in ("compute", "wait")} | changes
        found.append(("compute", "experts", 0, parts["compute"], -1, 3 * step))
        found.append(("compute", "wait", 0, parts["wait"], -1, 3 * step + 2))
    return tuple(Span(*span) for span in found)


def test_spans_of_the_last_marked_steps_are_kept(tmp_path):
    run = RUN._replace(spans=spans_of_steps(range(26, 30)))
    assert read_measured(write_measured(tmp_path, run)).spans == run.spans


@pytest.mark.parametrize(
    ("spans", "sentence"),
    [
        (spans_of_steps(range(25, 30)), "the spans must be of the last 4 marked steps"),
        (spans_of_steps(range(27, 30)), "the spans do not add up to compute"),
        (spans_of_steps(range(26, 30), compute=1), "the spans do not add up to compute"),
        (spans_of_steps(range(26, 30), wait=10**9), "the spans do not add up to wait"),
        ((Span("compute", "wait", 0.5, 1, -1, 90),), "entries must be [resource, what, start, end, key, event]"),
    ],
)
def test_spans_that_contradict_the_steps(tmp_path, spans, sentence):
    assert refusal(write_measured(tmp_path, RUN._replace(spans=spans))) == sentence


def test_a_folder_without_runs(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="there is no measured run"):
        read_folder(tmp_path)


# ---- what the executor writes ------------------------------------------------------------------------------------


def replay_row():
    """Return RUN as `real.replay` would have written it, with the counts of all 30 steps."""
    from real.validation.measured import decisions_digest

    marked = RUN.marked
    return {
        "cell": "cell",
        "system": "lru",
        "model": dict(SHAPE),
        "slots": 10,
        "warmup": 4,
        "timed": 18,
        "marked": 8,
        "device": RUN.device,
        "torch": "none",
        "step_ns": RUN.timed["total_ns"].tolist(),
        "marked_ns": {name: marked[f"{name}_ns"].tolist() for name in ("compute", "wait", "host", "link_busy")},
        **{name: [0] * 4 + RUN.steps[name].tolist() for name in ("hits", "late_hits", "misses")},
        "bytes_by_kind": RUN.bytes_by_kind,
        "decisions_digest": decisions_digest(RUN.log),
        "link_bytes_per_s": 1e9,
        "copy_efficiency": 0.97,
    }


REPLAYED = (RUN.cell, RUN.log, np.ones(30, bool), RUN.trace_hash)


def test_a_cell_that_the_executor_ran_becomes_a_measured_run():
    found = from_replay(RUN.cell, replay_row(), RUN.log, np.ones(30, bool), RUN.trace_hash)
    pd.testing.assert_frame_equal(found.steps, RUN.steps)
    assert found._replace(steps=None) == RUN._replace(steps=None)
    assert from_replay(*REPLAYED[:1], {**replay_row(), "driver": "580.1"}, *REPLAYED[1:]).driver == "580.1"


def test_host_time_and_spans_come_from_stamps_and_marks():
    """Of 30 steps of 3 layers: host parts of the timed steps, spans of the last marked ones."""
    stamps = np.arange(30 * 3 * 6).reshape(30, 3, 6) * 10
    stamps[22:] *= 2  # marked steps, which do not count
    marks = [
        (step, layer, MARKS.index(kind), 1000 * step + 10 * place)
        for step in range(22, 30)
        for place, (layer, kind) in enumerate([(0, "attention"), (0, "gate"), (0, "start"), (2, "head"), (2, "step_end")])
    ]
    found = from_replay(*REPLAYED[:1], replay_row(), *REPLAYED[1:], {"stamps": stamps.tolist(), "marks": marks})
    assert found.host_per_layer_ns == {part: {"median": 10, "p10": 10, "p90": 10} for part in HOST_PARTS}
    assert [span[1:] for span in found.spans if span[0] == "compute"][:5] == [
        ("attention", 26000, 26020, -1, 78),  # there are no shared experts
        ("experts", 26020, 26030, -1, 78),
        ("step", 26030, 26040, -1, 80),
        ("host", 26040, 27000, -1, 80),
        ("attention", 27000, 27020, -1, 81),
    ]
    assert {span[5] // 3 for span in found.spans} == {26, 27, 28, 29}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("slots", 11, "the result of 'cell' has 11 slots, its cell 10"),
        ("warmup", 5, "the result of 'cell' has warmup 5, its cell 4"),
        ("system", "fifo", "the result of 'cell' is of another model or system than its cell"),
        ("decisions_digest", "0", "the decisions of 'cell' do not have the digest that its result states"),
    ],
)
def test_a_result_of_another_cell_is_refused(field, value, sentence):
    with pytest.raises(InputError) as error:
        from_replay(RUN.cell, {**replay_row(), field: value}, RUN.log, np.ones(30, bool), RUN.trace_hash)
    assert str(error.value) == sentence


def test_results_are_read_as_the_executor_writes_them(tmp_path):
    with pytest.raises(InputError, match=r"results.jsonl: No such file"):
        list(replay_results(tmp_path))
    rows = [{"cell": "broken", "error": "no memory"}, replay_row()]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "decisions.jsonl.gz", "wt") as file:
        columns = dict(zip(("ns", "what", "key", "event"), zip(*RUN.log, strict=True), strict=True))
        file.write(json.dumps({"cell": "cell", **columns}) + "\n")
    with gzip.open(tmp_path / "stamps.jsonl.gz", "wt") as file:
        file.write(json.dumps({"cell": "another", "stamps": [], "marks": []}) + "\n")
    with pytest.raises(InputError, match="the stamps of 'cell' are missing"):
        list(replay_results(tmp_path))
    with gzip.open(tmp_path / "stamps.jsonl.gz", "at") as file:
        file.write(json.dumps({"cell": "cell", "stamps": [], "marks": [[1, 0, 0, 5]]}) + "\n")
    ((row, log, times),) = replay_results(tmp_path)
    assert (row["cell"], log, times["marks"]) == ("cell", RUN.log, [[1, 0, 0, 5]])
