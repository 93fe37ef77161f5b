"""A timeline's slices nest, its flows bind, and its integers are those of the engine."""

import gzip
import json
from itertools import pairwise

import pytest

from real.validation.command import GROUND_TRUTH
from real.validation.measured import read_measured
from sim.cli import main
from sim.config import compose_config
from sim.conformance import difference
from sim.experiment import costs_of, system_of, workload_of
from sim.reference import run_reference
from sim.timeline import COMPUTE, H2D, HOST, LAYERS, Recording, write_timeline

PART = ["trace.tokens=80", "workload.phases=decode"]
"""Of the bundled recording: steps of one token."""


def recorded(system, budget, chunks):
    """Run a system on the bundled recording, in copies of `chunks` pieces; return what it was, and what was recorded."""
    config = compose_config("simulate", [f"system={system}", f"budget={budget}", *PART])
    workload = workload_of(config)
    costs = costs_of(config, workload)[0]
    piece = costs.last_chunk_ns // chunks
    costs = costs._replace(
        chunks=chunks, chunk_ns=piece, last_chunk_ns=piece, chunk_bytes=costs.expert_bytes // chunks, link_start_ns=1000
    )
    costs = costs._replace(group_ns=700, beside_ns=300, shared_ns=900, host_demand_ns=200, host_ahead_ns=400, demand_ns=())
    log, spans = [], []
    run = run_reference(system_of(config, workload, costs), workload, costs, log, spans)
    silent_log = []
    silent = run_reference(system_of(config, workload, costs), workload, costs, silent_log)
    assert not difference(run, log, silent, silent_log), "being watched changes what happens"
    return run, workload, costs, Recording(log, spans)


@pytest.fixture(
    scope="module",
    params=[
        ("fate", 0.25, 3),
        ("fate_released", 0.3, 1),
        ("lru", 0.02, 2),
        ("popularity", 0.25, 5),
        ("clairvoyant", 0.5, 2),
    ],
    ids=lambda param: param[0],
)
def written(request, tmp_path_factory):
    """A whole run, and the records of its timeline."""
    run, workload, costs, recording = recorded(*request.param)
    model = workload.trace.model
    path = write_timeline(
        tmp_path_factory.mktemp("t") / "t.json.gz",
        {"run": recording},
        model.layers,
        model.experts,
        range(len(run.steps.compute)),
    )
    return run, costs, records_of(path)


def records_of(path):
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert content["displayTimeUnit"] == "ms"
    return content["traceEvents"]


def ns(microseconds):
    """Return whole nanoseconds; a timeline holds nothing else."""
    assert abs(microseconds * 1000 - round(microseconds * 1000)) < 1e-3
    return round(microseconds * 1000)


def slices(records, track, pid=1):
    found = [record for record in records if record["ph"] == "X" and (record["pid"], record["tid"]) == (pid, track)]
    return sorted(found, key=lambda record: ns(record["ts"]))


def total(found):
    return sum(ns(record["dur"]) for record in found)


def assert_in_a_row(records):
    """Slices of one track must nest; these do not even overlap."""
    for pid, track in {(record["pid"], record["tid"]) for record in records if record["ph"] == "X"}:
        for one, other in pairwise(slices(records, track, pid)):
            assert ns(one["ts"]) + ns(one["dur"]) <= ns(other["ts"]), (track, one, other)


def test_slices_of_a_track_never_overlap(written):
    assert_in_a_row(written[2])


def test_the_compute_stream_is_accounted_for_without_a_gap(written):
    run, _, records = written
    found = slices(records, COMPUTE)
    for category in ("compute", "wait", "host"):
        part = [record for record in found if record["cat"] == category]
        assert total(part) == getattr(run.steps, category).sum()
    assert total(found) == run.steps.duration.sum() == run.end_ns


def test_the_link_was_busy_as_long_as_the_engine_says(written):
    run, _, records = written
    assert total(slices(records, H2D)) == run.link_busy_ns


def test_outcomes_are_the_engines_bytes(written):
    run, costs, records = written
    moved = slices(records, H2D)
    outcomes = {record["ts"]: record["args"]["outcome"] for record in moved}
    used = [outcomes[record["ts"]] for record in records if record["ph"] == "s"]
    for outcome in ("useful", "late"):
        assert used.count(outcome) * costs.expert_bytes == run.bytes_by_kind[outcome]
    loads = {(record["args"]["layer"], record["args"]["expert"]) for record in moved if record["args"]["kind"] == "demand"}
    assert len(loads) * costs.expert_bytes <= run.bytes_by_kind["demand"]
    for outcome, kind in (("used", "demand"), ("wasted", "wasted"), ("renewed", "refresh")):
        assert (outcome in outcomes.values()) == (run.bytes_by_kind[kind] > 0)


def test_most_resident_experts_are_the_engines_peak(written):
    run, _, records = written
    counted = [record["args"] for record in records if record["ph"] == "C"]
    resident = [args["resident experts"] for args in counted if "resident experts" in args]
    assert max(resident) == run.peak_slots
    waiting = [args["transfers under way"] for args in counted if "transfers under way" in args]
    assert min(waiting) >= 0
    assert max(waiting) > 0


def test_every_flow_starts_in_a_transfer_and_ends_in_the_use_of_the_same_expert(written):
    run, costs, records = written
    flows = {}
    for record in records:
        if record["ph"] in "sf":
            flows.setdefault(record["id"], []).append(record)
    assert len(flows) == (run.bytes_by_kind["useful"] + run.bytes_by_kind["late"]) // costs.expert_bytes
    places = {
        (record["tid"], record["ts"]): record
        for record in records
        if record["ph"] == "X" and record["tid"] in (H2D, COMPUTE)
    }
    for start, end in flows.values():
        assert (start["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        moved, used = places[start["tid"], start["ts"]], places[end["tid"], end["ts"]]
        assert moved["ts"] < used["ts"]
        assert moved["args"]["kind"] == "prefetch"
        assert used["cat"] == "compute"
        assert [moved["args"][name] for name in ("layer", "expert")] == [used["args"][name] for name in ("layer", "expert")]


def test_tracks_are_named(written):
    names = {record["tid"]: record["args"]["name"] for record in written[2] if record["name"] == "thread_name"}
    assert names == {
        LAYERS: "layers",
        COMPUTE: "compute stream",
        HOST: "host thread",
        H2D: "link, host to device",
    }


def test_a_part_of_a_run_begins_at_zero_and_holds_its_steps_only(tmp_path):
    run, workload, _, recording = recorded("fate", 0.25, 2)
    model = workload.trace.model
    last = len(run.steps.compute)
    path = write_timeline(tmp_path / "t.json.gz", {"run": recording}, model.layers, model.experts, range(last - 3, last))
    records = records_of(path)
    compute = slices(records, COMPUTE)
    assert min(record["ts"] for record in records if "ts" in record) == 0
    assert total(compute) == run.steps.duration[-3:].sum()
    assert len(slices(records, LAYERS)) == 3 * model.layers
    assert_in_a_row(records)


def test_a_log_alone_gives_layers_and_transfers_in_the_same_way(tmp_path):
    log = [(5, "miss", 9, 1), (6, "load", 9, 1), (6, "prefetch", 3, 1), (8, "landed", 9, 1), (9, "end", -1, 1)]
    log += [(11, "landed", 3, 1), (12, "hit", 3, 2), (12, "evict", 9, 2), (15, "end", -1, 2)]
    path = write_timeline(tmp_path / "t.json.gz", {"measured": Recording(log), "none": Recording([])}, 2, 8, range(2))
    records = records_of(path)
    assert [record["args"]["name"] for record in records if record["name"] == "process_name"] == ["measured", "none"]
    assert [(record["name"], ns(record["ts"]), ns(record["dur"])) for record in slices(records, LAYERS)] == [
        ("step 0, layer 1", 0, 4),
        ("step 1, layer 0", 7, 3),
    ]
    assert [
        (record["name"], ns(record["ts"]), ns(record["dur"]), record["args"]["outcome"]) for record in slices(records, H2D)
    ] == [
        ("demand layer 1, expert 1", 1, 2, "used"),
        ("prefetch layer 0, expert 3", 3, 3, "useful"),
    ]
    assert [(record["ph"], record["tid"], ns(record["ts"])) for record in records if record["ph"] in "sf"] == [
        ("s", H2D, 3),
        ("f", LAYERS, 7),
    ]


@pytest.mark.parametrize("folder", sorted(GROUND_TRUTH.glob("*")), ids=lambda folder: folder.name)
def test_measured_runs_give_tracks_that_nest(folder, tmp_path):
    run = read_measured(next(path for path in folder.glob("*fate*.json")))
    model = run.cell["model"]
    last = int(run.steps["step"].max())
    recording = Recording(run.log, run.spans)
    path = write_timeline(
        tmp_path / "t.json.gz", {"m": recording}, model["layers"], model["experts"], range(last - 3, last + 1)
    )
    records = records_of(path)
    assert_in_a_row(records)
    assert slices(records, H2D)
    assert slices(records, HOST)
    shown = slices(records, COMPUTE)
    parts = run.steps[-4:]
    for column, kind in (("compute_ns", "compute"), ("wait_ns", "wait")):
        assert total([record for record in shown if record["cat"] == kind]) == parts[column].sum()
    assert {record["name"] for record in shown} == {
        "attention and gate",
        "wait for the host",
        "wait for a transfer",
        "experts",
        "head",
    }


def test_the_command_writes_one_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["simulate", *PART, "budget=0.2", "engine=reference"]
    assert main([*run, "timeline=t.json.gz", "timeline_steps=2"]) == 0
    assert capsys.readouterr().err == "timeline: t.json.gz\n"
    assert len(slices(records_of(tmp_path / "t.json.gz"), LAYERS)) == 32
    for words, wrong in (
        ([*run, "timeline=t.json"], "timeline is 't.json': it must be a file NAME.json.gz"),
        ([*run, "timeline=t.json.gz", "timeline_steps=0"], "timeline_steps is 0: it must be at least 1, or null for all"),
        (["compare", "timeline=t.json.gz"], "timeline: only of one run"),
        (["sweep", "axes.system=[lru]", "timeline=t.json.gz"], "timeline: only of one run"),
        (["search", "experiment=tuning", "timeline=t.json.gz"], "timeline: only of one run"),
        (["sweep", "axes.timeline_steps=[1,2]"], "timeline_steps"),
        (["simulate", "-m", "system=lru,lfu", "timeline=t.json.gz"], "timeline: only of one run"),
    ):
        assert main(words) == 2
        assert wrong in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["timeline=x.json"], ["timeline=nowhere/x.json.gz"], ["timeline=x.json.gz", "timeline_steps=0"]]
)
def test_a_timeline_that_cannot_be_is_refused_before_anything_runs(words, tmp_path, capsys):
    from sim.cli import main

    assert main(["simulate", "system=lru", "trace.tokens=20", f"results={tmp_path / 'results'}", *words]) == 2
    assert "timeline" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
