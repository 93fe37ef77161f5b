"""Studies: their points are those of runs of their own, what is wrong is refused by name, and nothing runs twice."""

import json
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from builders import make_trace

import sim.study
from sim import store
from sim.cli import main
from sim.config import compose_config, compose_unnamed, options
from sim.experiment import key_of, simulate, workload_of
from sim.study import axes_of, plan, read_study, run_points, run_study, status
from traces import InputError, save_trace

STEPS = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 4], [0, 4]], [[0, 1], [2, 0]], [[2, 0], [1, 3]]]
"""Five tokens in two layers of five experts."""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Overrides of a study on a trace that takes no time, in the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    save_trace(make_trace(STEPS), tmp_path / "tiny.safetensors")
    return ["trace=tiny.safetensors", "model=trace", "engine=reference", "jobs=1"]


def axes(text):
    return f"++axes={text}"


# ---- points ----------------------------------------------------------------------------------------------


def test_points_are_every_combination_and_the_last_axis_changes_fastest(tiny):
    study = plan([*tiny, axes("{budget: [0.5, 1.0], system: [lru, lfu]}")])
    assert [list(point.axes.items()) for point in study.points[:1]] == [[("budget", 0.5), ("system", "lru")]]
    # Parts of a system are chosen first: its compiled code is loaded once.
    found = [(point.config["system"]["name"], point.config["budget"]) for point in study.points]
    assert found == [("lru", 0.5), ("lru", 1.0), ("lfu", 0.5), ("lfu", 1.0)]


POINTS = {
    "groups": (
        "{system: [fate], eviction: [lru], hardware: [rtx3090_pcie4], budget: [4GB]}",
        ["system=fate", "eviction=lru", "hardware=rtx3090_pcie4", "budget=4GB"],
    ),
    "what a system changed": ("{system: [clairvoyant], seed: [3]}", ["system=clairvoyant", "seed=3"]),
    "parameters": (
        "{system: [fate], prefetch: {depth: [2]}, predictor.count_votes: [true]}",
        ["system=fate", "prefetch.depth=2", "predictor.count_votes=true"],
    ),
    "nothing": ("{prefetch: [top_n], prefetch.n: [null]}", ["prefetch=top_n", "prefetch.n=null"]),
    "constants": (
        "{hardware.host.readout_ns.value: [5], link_gb_per_s: [12.5], free_link: [true]}",
        ["hardware.host.readout_ns.value=5", "link_gb_per_s=12.5", "free_link=true"],
    ),
    "a trace": (
        "{trace: [second_reference], model: [gpt_oss_20b], trace.requests: [held_out]}",
        ["trace=second_reference", "model=gpt_oss_20b", "trace.requests=held_out"],
    ),
}


@pytest.mark.parametrize("what", POINTS)
def test_a_point_is_a_run_of_its_own(what):
    given, overrides = POINTS[what]
    (point,) = plan(["hardware.host.step_ns.value=7", axes(given)]).points
    config = compose_config("simulate", ["hardware.host.step_ns.value=7", *overrides])
    assert point.config == config
    assert point.key == key_of(config, workload_of(config).trace)


def test_baselines_run_without_the_axes_that_change_a_system(tiny):
    study = plan([*tiny, axes("{system: [lrfu], eviction.decay: [0.5, 0.9], budget: [0.5, 1.0]}"), "baselines=[lru]"])
    found = [tuple(point.axes.values()) for point in study.points]
    assert found == [
        ("lrfu", 0.5, 0.5), ("lrfu", 0.5, 1.0), ("lrfu", 0.9, 0.5), ("lrfu", 0.9, 1.0), ("lru", 0.5), ("lru", 1.0),
    ]  # fmt: skip


def test_all_stands_for_every_option_of_a_group(tiny):
    assert plan([*tiny, axes("{workload: all}"), "system=lru"]).points[-1].axes == {"workload": options("workload")[-1]}


def test_a_value_of_the_command_line_comes_last(tiny):
    study = plan(["experiment=lookahead_depth", "++axes.prefetch.depth=[3]", "++axes.budget=[0.5]", "++axes.system=[fate]"])
    assert study.points[0].axes == {"system": "fate", "prefetch.depth": 3, "budget": 0.5}


REFUSED_AXES = {
    "none": ({}, "axes is empty: choose an experiment=NAME, or name an axis, such as axes.system=[lru,fate]"),
    "unknown": ({"budgt": [1]}, "axes.budgt: 'budgt' is no setting of a run: did you mean 'budget'? known: "),
    "not of a run": ({"results": ["a"]}, "axes.results: 'results' is no setting of a run: "),
    "no list": ({"budget": 0.5}, "axes.budget is 0.5: it must be a list of values, such as [0.5]"),
    "empty": ({"budget": []}, "axes.budget is empty: name at least one value, or take the axis out with ~axes.budget"),
    "unknown option": ({"system": ["lruu"]}, "axes.system is 'lruu': did you mean 'lru'? known: arc, "),
    "all of no group": ({"budget": "all"}, "axes.budget is 'all': it must be a list of values, such as [all]"),
    "given twice": ({"seed": [1]}, "seed is an axis of this study: change its values with axes.seed=[...]"),
}


@pytest.mark.parametrize("what", REFUSED_AXES)
def test_a_wrong_axis_is_refused(what):
    axes, sentence = REFUSED_AXES[what]
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        axes_of({**base(), "axes": axes}, ["seed=2"], None)


@cache
def base():
    return compose_unnamed("sweep")


REFUSED = {
    "unknown parameter": (
        ["++axes.prefetch.dept=[1]", "system=fate"],
        "axes.prefetch.dept: system 'fate' has no such setting: did you mean 'depth'? known: depth, percentile",
    ),
    "no parameters": (
        ["++axes.eviction.decay=[1]"],
        "axes.eviction.decay: system 'lru' has no such setting: it takes no parameters",
    ),
    "wrong type": (["++axes.seed=[0,a]"], "seed is 'a': it must be a whole number of at least 0"),
    "wrong link": (["++axes.link_gb_per_s=[0]"], "link_gb_per_s is 0: it must be a number of GB/s above 0, or null for "),
    "wrong parameter": (
        ["++axes.prefetch.depth=[deep]", "system=fate"],
        "prefetch.depth is 'deep': it must be a whole number",
    ),
    "wrong budget": (["++axes.budget=[0.5,abc]"], "budget is 'abc': it must be a fraction of all experts above 0 and at "),
    "a value for a group": (["++axes.hardware.link=[3]"], "axes.hardware.link holds 3, but it is a group of settings: "),
    "wrong constant": (
        ["++axes.hardware.host.readout_ns.value=[-1]"],
        "hardware.host.readout_ns.value is -1: it must be a whole number of ns, at least 0",
    ),
    "unknown baseline": (["++axes.budget=[0.5]", "baselines=[lruu]"], "baselines is 'lruu': did you mean 'lru'? known: "),
    "baselines no list": (["++axes.budget=[0.5]", "baselines=lru"], "baselines is 'lru': it must be a list of systems, "),
    "axes no mapping": (["++axes=3"], "axes is 3: it must be a mapping such as "),
    "no name": (["++axes.budget=[0.5]", "study=a/b"], "study is 'a/b': it names a file and is made of letters, "),
    "no jobs": (["++axes.budget=[0.5]", "jobs=0"], "jobs is 0: it must be a number of processes, or -1 for one per core"),
    "none can run": (["++axes.system=[fate]"], "no point of the study can run: system 'fate': its predictor "),
    "unknown experiment": (["experiment=rankin"], "experiment=rankin: experiment 'rankin' is unknown: did you mean "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_before_anything_runs(tiny, tmp_path, what):
    words, sentence = REFUSED[what]
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        run_study([*tiny, *words])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


# ---- experiments -----------------------------------------------------------------------------------------

FEWER = {name: ["++axes.system=[lru,fate]"] for name in ("ranking", "budget_curves", "hardware_crossover")}
"""Every system is composed by another test, and takes its time."""


@pytest.mark.parametrize("name", [name for name in options("experiment") if name != "tuning"])
def test_every_experiment_runs(tmp_path, name):
    small = ["trace.tokens=12", "engine=reference", "jobs=1", f"results='{tmp_path}'"]
    study = plan([f"experiment={name}", *small, *FEWER.get(name, [])])
    assert (study.name, study.left_out) == (name, [])
    axes_of(compose_unnamed("sweep", [f"experiment={name}"]), [], None)  # which systems it names
    points = [*study.points[::9], study.points[-1]]
    assert run_points(study, points, lambda done, total, what: None) == (len({p.key for p in points}), {})
    assert set(store.read_rows(tmp_path)["key"]) == {point.key for point in points}


# ---- running and resuming --------------------------------------------------------------------------------


def test_a_study_leaves_rows_of_its_points_and_says_which(tiny):
    told = []
    words = [*tiny, axes("{system: [lru, lrfu], link_gb_per_s: [1, 10], seed: [0, 1]}"), "budget=0.5", "study=mine"]
    outcome = run_study(words, progress=lambda *what: told.append(what))
    assert (outcome.stored, outcome.computed, outcome.left_out) == (8, 8, [])
    assert told[-1] == (8, 8, "lrfu at 0.5")
    rows = read_study("results", "mine")
    assert list(rows["key"]) == [point.key for point in outcome.study.points]
    assert list(rows["link_gb_per_s"]) == [1, 1, 10, 10] * 2
    assert list(rows.columns) == [*store.SCHEMA.names, "link_gb_per_s"]
    few = read_study("results", "mine", ["tokens_per_s"])
    assert list(few.columns) == ["tokens_per_s", "key", "link_gb_per_s"]


def test_an_axis_that_does_not_apply_is_none(tiny):
    run_study([*tiny, axes("{system: [lrfu], eviction.decay: [0.5], budget: [0.5]}"), "baselines=[lru]"])
    assert list(read_study("results", "sweep")["eviction.decay"]) == [0.5, None]


def test_what_is_stored_does_not_run_again(tiny, monkeypatch):
    words = [*tiny, axes("{system: [lru, lfu], budget: [0.5, 1.0]}")]
    simulate(compose_config("simulate", [*tiny[:3], "system=lfu", "budget=1.0"]))
    ran = []
    monkeypatch.setattr(sim.study, "simulate", lambda config: ran.append(config["system"]["name"]) or simulate(config))
    assert run_study(words).computed == 3
    assert ran == ["lru", "lru", "lfu"]
    assert run_study(words)[1:] == (4, 0, [])
    assert len(ran) == 3


def test_the_same_rows_come_from_several_processes(tiny):
    words = [axes("{system: [lru, sieve], budget: [0.5, 1.0]}"), *tiny[:3]]
    one, two = (run_study([*words, f"jobs={jobs}", f"results=by{jobs}"]) for jobs in (1, 2))
    assert one[1:] == two[1:] == (4, 4, [])
    pd.testing.assert_frame_equal(store.read_rows("by1"), store.read_rows("by2"), check_exact=True)


def test_points_that_cannot_run_are_said_and_the_others_run(tiny):
    outcome = run_study([*tiny, axes("{system: [lru, lru_per_layer, fate], budget: [0.3, 0.5]}")])
    assert (outcome.stored, outcome.computed) == (3, 3)
    assert sorted(sentence.partition(":")[0] for sentence in outcome.left_out) == [
        "system 'fate'",
        "system 'lru_per_layer'",
    ]
    (found,) = status("results")
    assert (found.points, found.stored, found.missing, len(found.cannot_run)) == (4, 3, [], 1)


def test_status_says_what_is_missing(tiny, capsys):
    study = plan([*tiny, axes("{system: [lru, lfu], budget: [0.5, 1.0]}")])
    sim.study.write_study(study, {})
    run_points(study, study.points[:3], lambda done, total, what: None)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == (
        "sweep: 3 of 4 points stored, 1 missing\n  the first missing: system=lfu budget=1.0\n"
    )


def test_a_status_of_nothing_and_a_damaged_study_are_refused(tiny, tmp_path, capsys):
    assert main(["status"]) == 2
    assert capsys.readouterr().err == "foregate: results: no study was run here\n"
    (tmp_path / "results" / "studies").mkdir(parents=True)
    (tmp_path / "results" / "studies" / "half.json").write_text('{"points": {')
    assert main(["status"]) == 2
    assert capsys.readouterr().err == (
        "foregate: results/studies/half.json: not the list of a study's points; delete it and sweep again\n"
    )


def test_a_study_that_is_not_there_is_refused(tiny):
    with pytest.raises(InputError, match=r"results/studies/no.json: there is no such study: none was run yet"):
        read_study("results", "no")
    study = plan([*tiny, axes("{budget: [0.5]}")])
    sim.study.write_study(study, {})
    with pytest.raises(InputError, match="no result of the study 'sweep' is stored"):
        read_study("results", "sweep")


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_says_what_is_stored(tiny, capsys):
    assert main(["sweep", *tiny, "axes.system=[lru,fate]", "budget=0.5", "study=mine"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (
        "mine: 1 points stored, 1 of them computed now; rows: results/rows, which of them are the study's: "
        "results/studies/mine.json\n"
    )
    assert captured.err.splitlines()[1].startswith("left out: system 'fate': its predictor CrossLayerGate needs lookahead")
    assert json.loads(Path("results/studies/mine.json").read_text())["overrides"][-1] == "study=mine"


def test_hydra_sweeps_outer_axes_and_every_job_is_a_study(tiny, capsys):
    words = ["sweep", "-m", *tiny, "budget=0.5", "axes.system=[lru,lfu]", "seed=0,1"]
    assert main(words) == 0
    assert [each.name for each in status("results")] == ["sweep+seed=0", "sweep+seed=1"]
    assert len(store.read_rows("results")) == 4
    assert main([*words[:-1], "seed=a,1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("sweep+seed=1: 2 points stored, 0 of them computed now; ")
    assert captured.err.splitlines()[-1] == "foregate: seed is 'a': it must be a whole number of at least 0"
