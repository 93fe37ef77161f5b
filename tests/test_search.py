"""Searches: tuned on some requests, reported on others, the same whenever they are stopped and resumed."""

import re

import pytest
from builders import make_trace

import sim.study
from sim import store
from sim.cli import main
from sim.experiment import simulate
from sim.search import search
from sim.study import read_study, status
from traces import InputError, save_trace

pytest.importorskip("optuna", reason="a search needs the extra `search`")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Overrides of a search on a trace of twelve requests of six tokens, in the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    steps = [[[(5 * token + 3 * layer) % 7, (token * token + layer) % 7] for layer in range(3)] for token in range(72)]
    steps = [[[a, b if b != a else (b + 1) % 7] for a, b in step] for step in steps]
    save_trace(make_trace(steps, requests=[token // 6 for token in range(72)]), tmp_path / "tiny.safetensors")
    words = ["trace=tiny.safetensors", "model=trace", "engine=reference", "jobs=1", "budget=0.5", "system=lrfu"]
    return [*words, "trials=7", "at_once=3"]


DECAY = "++space.eviction.decay={low: 0.1, high: 0.999}"


def test_parameters_are_tuned_on_some_requests_and_reported_on_others(tiny):
    found = search([*tiny, DECAY])
    assert (found.before, list(found.after), found.trials, found.failed) == (
        {"eviction.decay": 0.96},
        ["eviction.decay"],
        7,
        [],
    )
    rows = read_study("results", "search")
    tuned = rows[rows["trace"] == "tiny+requests=tuning"]
    held_out = rows[rows["trace"] == "tiny+requests=held_out"]
    assert len(tuned) + len(held_out) == len(rows)
    assert list(rows["trace.requests"]) == ["tuning"] * len(tuned) + ["held_out"] * len(held_out)
    assert {tuple(part["request_tokens"].iloc[0]) for part in (tuned, held_out)} == {(6,) * 6}
    assert len(set(tuned["trace_hash"]) | set(held_out["trace_hash"])) == 2
    speed = rows.set_index("key")["tokens_per_s"]
    best, first = tuned.loc[tuned["tokens_per_s"].idxmax()], tuned.iloc[0]
    assert first["system"] == "lrfu"
    assert found.tuning.ratio == pytest.approx(best["tokens_per_s"] / first["tokens_per_s"])
    assert found.held_out.ratio == pytest.approx(speed[held_out["key"].iloc[-1]] / speed[held_out["key"].iloc[0]])
    assert found.gap == found.tuning.ratio - found.held_out.ratio
    assert (found.tuning.requests, found.held_out.requests) == (6, 6)


def test_a_search_that_was_stopped_goes_on_to_the_same_end(tiny, monkeypatch):
    words = [*tiny, DECAY]
    whole = search([*words, "results=whole"])
    ran = []

    def counted(config):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(config["system"]["name"])
        return simulate(config)

    monkeypatch.setattr(sim.study, "simulate", counted)
    with pytest.raises(KeyboardInterrupt):
        search([*words, "results=stopped"])
    assert status("stopped")[0].stored == 4
    monkeypatch.setattr(sim.study, "simulate", lambda config: ran.append(config["system"]["name"]) or simulate(config))
    resumed = search([*words, "results=stopped"])
    assert resumed[1:] == whole[1:]
    assert len(ran) == len(whole.study.points)
    store_rows = [store.read_rows(name) for name in ("whole", "stopped")]
    assert store_rows[0].equals(store_rows[1])


def test_choices_and_whole_numbers_are_searched_too(tiny):
    words = [word for word in tiny if not word.startswith("system")]
    space = ["++space.prefetch.n={low: 1, high: 3}", "++space.prefetch.depth=[1,2]"]
    found = search([*words, "system=previous_token", *space])
    assert all(type(value) is int for value in found.after.values() if value is not None)
    names = set(read_study("results", "search", ["system"])["system"])
    assert names - {"previous_token"} <= {
        f"previous_token+prefetch.depth={depth}+prefetch.n={n}" for depth in (1, 2) for n in (1, 2, 3)
    }


REFUSED = {
    "no space": ([], "space is empty: choose experiment=tuning, or name a parameter: space.prefetch.depth=[1,2,3]"),
    "unknown parameter": (
        ["++space.eviction.dekay=[0.5]"],
        "space.eviction.dekay: system 'lrfu' has no such setting: did you mean 'decay'? known: decay",
    ),
    "wrong type": (["++space.eviction.decay=[a]"], "eviction.decay is 'a': it must be a number"),
    "no range": (["++space.eviction.decay=0.5"], "space.eviction.decay is 0.5: it must be a list of values, or {low: "),
    "empty": (["++space.eviction.decay=[]"], "space.eviction.decay is empty: name at least one value"),
    "upside down": (
        ["++space.eviction.decay={low: 2, high: 1}"],
        "space.eviction.decay is {'low': 2, 'high': 1}: low and high must be numbers, and low the smaller one",
    ),
    "half a range": (["++space.eviction.decay={low: 2}"], "space.eviction.decay is {'low': 2}: low and high must be "),
    "unknown field": (
        ["++space.eviction.decay={low: 1, high: 2, steps: 3}"],
        "space.eviction.decay has no field 'steps': known: high, log, low",
    ),
    "log of nothing": (
        ["++space.eviction.decay={low: 0, high: 1, log: true}"],
        "space.eviction.decay.log is True: it must be true or false, and low above 0 where it is true",
    ),
    "given twice": ([DECAY, "eviction.decay=0.5"], "eviction.decay is searched: change where with space.eviction.decay=..."),
    "its own split": ([DECAY, "trace.requests=tuning"], "trace.requests is the search's own: it tunes on one half and "),
    "no trials": ([DECAY, "trials=0"], "trials is 0: it must be a whole number of at least 1"),
    "one request": (
        [DECAY, "trace.tokens=5"],
        "the trace has one request: it takes two to split it into parts that share none",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_before_anything_runs(tiny, tmp_path, what):
    words, sentence = REFUSED[what]
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        search([*tiny, *words])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_the_experiment_runs_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=tuning", "engine=reference", "jobs=1", "trials=2", "at_once=2", "trace.tokens=300"]
    assert main(["search", *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"next_gate_lrfu: eviction.decay 0.96 -> [\d.]+, prefetch.n (null|\d+) -> (null|\d+), prefetch.depth 1 -> [123] "
        r"\(the fastest of 2 trials\)",
        out[0],
    )
    assert [line.partition("(")[0] for line in out[1:3]] == ["  the requests it was tuned on ", "  the requests held out "]
    assert re.fullmatch(r"  gap: -?\d+\.\d points; rows: results/rows", out[3])
