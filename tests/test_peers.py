"""The comparison with other ways of offloading: every arm, through the same code as on a GPU, and what the rows say."""

# ruff: noqa: E402  # what must be there comes first

import json

import pytest

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")
pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")
pytest.importorskip("accelerate", reason="an arm is accelerate's")

import real.peers.__main__ as peers
from benchmarks.tables import PAGE, with_peers
from real.peers.__main__ import Task, build_model, main, run_arm, tasks_of
from real.peers.arms import Accelerate, Ours, PerLayerLRU, PolicyLang, Recorded, Resident, all_arms
from real.peers.report import defects, summarise, table
from traces import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

TASKS = [Task([5, 9, 3, 17, 22, 60], [80, 81, 4]), Task([7, 8, 9, 100, 90], [11, 99, 3, 3, 64, 120, 5])]


@pytest.fixture(scope="module")
def model():
    built = build_model("tiny", "cpu")
    yield built
    built.close()


@pytest.fixture(scope="module")
def expected(model):
    return run_arm(Resident("eager"), model, TASKS)["tokens"]


@pytest.mark.parametrize(
    "arm",
    [
        Resident("grouped_mm"),
        Resident("batched_mm"),
        PerLayerLRU(0.25, write_back=True),
        PerLayerLRU(0.5),
        PerLayerLRU(0.25, our_kernel=True),
        Accelerate(),
        Ours("lru", 1.0, graphs=False),
        Ours("next_gate_lrfu", 0.5, graphs=False),
    ],
    ids=lambda arm: arm.name,
)
def test_every_arm_gives_the_same_tokens_and_leaves_the_model_as_it_was(model, expected, arm):
    row = run_arm(arm, model, TASKS)
    assert row["decoded"] == (3 if isinstance(arm, Accelerate) else 7)
    assert row["tokens"] == expected[: row["decoded"] + 1]
    assert all(list(layer.experts.parameters()) == [] for layer in model.layers)
    assert not any(hasattr(module, "_hf_hook") for module in model.model.modules())
    if arm.kind != "resident" and not isinstance(arm, Accelerate):
        assert 0 < row["hit_rate"] < 1
        assert row["bytes_h2d"] > 0


def test_arms_are_fed_the_tokens_and_not_what_they_gave(model):
    other = [TASKS[0], Task(TASKS[1].prompt, [11, 42, 3, 3, 64, 120, 5])]
    for arm in (Resident("eager"), Ours("lru", 0.5, graphs=False)):
        one, two = (run_arm(arm, model, tasks)["tokens"] for tasks in (TASKS, other))
        assert one[:2] == two[:2]
        assert one[2:] != two[2:]


def test_a_per_layer_lru_counts_what_it_moves(model):
    """At 0.25 a layer has two slots for two experts a token: whatever the last token did not use is loaded."""
    row = run_arm(PerLayerLRU(0.25, write_back=True), model, TASKS)
    assert row["bytes_d2h"] == row["bytes_h2d"]
    needed = row["decoded"] * len(model.layers) * model.top_k
    assert row["bytes_h2d"] == round((1 - row["hit_rate"]) * needed) * model.layout.expert_bytes


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_at_equal_kernels_the_peer_does_what_our_per_layer_lru_does(model, budget):
    theirs = run_arm(PerLayerLRU(budget, our_kernel=True), model, TASKS)
    ours = run_arm(Ours("lru_per_layer", budget, graphs=False), model, TASKS)
    same = ("kernel", "tokens", "bytes_h2d", "hit_rate", "device_expert_bytes")
    assert [theirs[name] for name in same] == [ours[name] for name in same]


def test_the_anchor_knows_what_the_resident_model_chose(model, expected):
    recorded = Recorded()
    anchor = Ours("clairvoyant", 0.5, graphs=True, recorded=recorded)
    with pytest.raises(InputError, match="knows the future from 'resident foregate, graphs', which did not run before it"):
        run_arm(anchor, model, TASKS)
    run_arm(Ours("lru", 1.0, graphs=True, recorded=recorded), model, TASKS)
    row = run_arm(anchor, model, TASKS)
    assert (row["kind"], row["tokens"], row["unforeseen_events"]) == ("anchor", expected, 0)
    assert row["hit_rate"] > run_arm(Ours("lru", 0.5, graphs=True), model, TASKS)["hit_rate"]


def test_an_arm_whose_package_is_missing_says_so(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "moe_policylang", None)
    with pytest.raises(InputError, match="the package moe_policylang is not installed"):
        run_arm(PolicyLang(0.25, pinned=False), model, TASKS)


def test_arms_have_different_names_and_what_knows_the_future_runs_after_who_recorded_it():
    arms = all_arms((0.25, 0.5))
    assert len({arm.name for arm in arms}) == len(arms)
    assert arms[0].name == "resident foregate, graphs"
    assert [arm.kernel for arm in arms if arm.kind == "anchor"] == ["foregate, graphs"] * 2
    fast = [arm.slow for arm in arms]
    assert fast == sorted(fast)


def test_tasks_are_the_same_in_every_call():
    assert tasks_of(128, 6, 3, 7) == tasks_of(128, 6, 3, 7)
    assert [(len(task.prompt), len(task.forced)) for task in tasks_of(128, 6, 3, 7)] == [(6, 3), (6, 7)]


WORDS = ["--where", "cpu", "--shape", "tiny", "--skip-identity", "--prompt-tokens", "6", "--warm-up-tokens", "3"]
WORDS += ["--tokens", "6", "--only"]
SOME = "resident foregate,resident eager,foregate lru_per_layer,our kernel,clairvoyant,accelerate"


def test_the_command_writes_rows_and_a_summary_and_the_page_can_be_made_of_it(tmp_path, capsys):
    assert main(["--out", str(tmp_path), *WORDS, SOME]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    decoded = {(row["repeat"], row["arm"]): row["decoded"] for row in rows}
    assert [decoded[repeat, "resident eager"] for repeat in range(3)] == [2, 6, 6]
    assert [name for name in decoded if name[1] == "accelerate cpu offload"] == [(1, "accelerate cpu offload")]
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    assert summary["errors"] == []
    assert all(arm["unlike_resident_eager"] == 0 for arm in arms.values())
    assert {arm["repeats"] for name, arm in arms.items() if name != "accelerate cpu offload"} == {2}
    assert summary["equal_kernels"]["0.5"]["ratio_of_bytes"] == 1
    assert summary["of_bound"]["0.25"]["anchor"]["arm"] == "foregate clairvoyant, graphs, 0.25"
    text = table(summary)
    assert f"{text}\n\nA stand-in on a CPU times nothing: " in capsys.readouterr().out
    page = with_peers(PAGE.read_text(), summary)
    assert text in page
    assert with_peers(page, summary) == page
    assert with_peers(page, {**summary, "format": 1}) == page


def test_arms_that_there_are_not_are_refused_before_anything_runs(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), *WORDS, "resident, nosucharm", "lru"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--only: no arm's name contains 'nosucharm': known: resident foregate, graphs; ")
    assert list(tmp_path.iterdir()) == []


def test_a_token_of_ours_that_differs_fails_the_command(tmp_path, capsys, monkeypatch):
    def spoilt(arm, *arguments):
        row = run_arm(arm, *arguments)
        if arm.name == "foregate lru, graphs, 0.5":
            row["tokens"][-1] += 1
        return row

    monkeypatch.setattr(peers, "run_arm", spoilt)
    assert main(["--out", str(tmp_path), *WORDS, "resident foregate,foregate lru", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "not the resident model's tokens: foregate lru, graphs, 0.5"
    assert "1 of 7 differ" in captured.out


def test_when_time_is_up_no_further_arm_runs_and_the_summary_is_written(tmp_path, capsys):
    assert main(["--out", str(tmp_path), *WORDS, SOME, "--minutes", "0"]) == 0
    assert "time is up in repeat 0: resident foregate, graphs and what follows did not run" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["arms"] == []


def row(arm, kind, kernel, speed, repeat, **more):
    return {
        "arm": arm,
        "kind": kind,
        "kernel": kernel,
        "budget": None if kind == "resident" else 0.25,
        "device_expert_bytes": 1,
        "tokens_per_s": speed,
        "prefill_s": 0.1,
        "decoded": 10,
        "tokens": [1, 2, 3],
        "peak_device_bytes": 10**9,
        "repeat": repeat,
        **more,
    }


def test_ratios_and_the_bound_are_those_of_the_rows():
    host = {"issue_gate": 7e3, "await_gate": 2e5, "issue_experts": 15e3}
    live = {"hit_rate": 0.5, "link_bytes_per_s": 1e9, "host_per_layer_ns": host, "unforeseen_events": 0, "bytes_h2d": 10**8}
    graphs, eager = "foregate, graphs", "foregate, eager"
    lru = ("foregate lru, graphs, 0.25", "ours", graphs)
    absent = {"arm": "moe-policylang", "kind": "peer", "error": "InputError: not there", "repeat": 0}
    rows = [
        row("resident foregate, graphs", "resident", graphs, 200.0, 1, **live | {"bytes_h2d": 0}),
        row("resident foregate, eager", "resident", eager, 40.0, 1, **live | {"bytes_h2d": 0}),
        row("resident eager", "resident", "eager", 20.0, 1, tokens=[1, 2, 4]),
        row(*lru, 1.0, 0, **live),
        row(*lru, 80.0, 1, **live),
        row(*lru, 90.0, 2, **live | {"tokens": [1, 5, 3]}),
        row("foregate lru_per_layer, eager, 0.25", "ours", eager, 30.0, 1, **live),
        row("foregate clairvoyant, graphs, 0.25", "anchor", graphs, 98.0, 1, **live | {"unforeseen_events": 2}),
        row("per-layer lru, no write-back, 0.25", "peer", "eager", 17.0, 1),
        row("per-layer lru, our kernel, 0.25", "equal", eager, 15.0, 1, bytes_h2d=10**8, hit_rate=0.5),
        row("accelerate cpu offload", "peer", "grouped_mm", 1.0, 1) | {"budget": None, "tokens": [1, 9], "decoded": 1},
        absent,
        {"arm": "foregate fate, graphs, 0.25", "kind": "ours", "error": "InputError: no room", "repeat": 1},
    ]
    found = summarise(rows)
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert arms["foregate lru, graphs, 0.25"]["tokens_per_s"] == 85.0
    assert arms["foregate lru, graphs, 0.25"]["of_bound"] == pytest.approx(85 * max(1 / 200, 10**7 / 1e9))
    ratio = {"ours": "foregate lru, graphs, 0.25", "peer": "per-layer lru, no write-back, 0.25", "ratio": 5.0}
    assert found["over_best_peer"] == {"0.25": ratio}
    equal = {"ours": "foregate lru_per_layer, eager, 0.25", "peer": "per-layer lru, our kernel, 0.25"}
    fastest = {"ours": ratio["ours"], "peer": equal["peer"], "ratio": 85 / 15}
    assert found["equal_kernels"] == {"0.25": equal | {"ratio": 2.0, "ratio_of_bytes": 1.0, "fastest": fastest}}
    assert {name: bound["of_bound"] for name, bound in found["of_bound"]["0.25"].items()} == {
        "graphs": pytest.approx(0.85),
        "eager": pytest.approx(0.75),
        "anchor": pytest.approx(0.98),
    }
    assert [arm["unlike_resident_eager"] for arm in found["arms"][-2:]] == [1, 1]
    assert arms["accelerate cpu offload"]["unlike_resident_same_kernel"] is None
    assert defects(found) == [
        "not the resident model's tokens: foregate lru, graphs, 0.25",  # in the last of its repeats
        "failed: foregate fate, graphs, 0.25",
    ]
    assert found["errors"][0] == absent
    text = table(found)
    lines = (
        "| foregate lru, graphs, 0.25 | 2 | 10 | 85.0 | 80.0 to 90.0 | 0.500 | 10 | 1.0 "
        "| 2 of 11 differ | 1 of 11 differ | 85% |",
        "Budget 0.25: *foregate lru, graphs, 0.25* is **5.00 times** as fast as the best peer, "
        "*per-layer lru, no write-back, 0.25*.",
        "Budget 0.25, equal kernels, no graphs: *foregate lru_per_layer, eager, 0.25* is **2.00 times** as fast as "
        "*per-layer lru, our kernel, 0.25*, having moved 1.00 times the bytes; the fastest of ours is 5.67 times.",
        "Host time of a layer, *foregate lru, graphs, 0.25*, medians in microseconds: issue gate 7, issue experts 15; it "
        "waits for the gate for 200.",
        "*foregate clairvoyant, graphs, 0.25*: the router chose otherwise than recorded in 2 events.",
        "moe-policylang: InputError: not there",
    )
    assert [line for line in lines if line not in text.splitlines()] == []
    assert "`" not in text  # on the page `foregate ...` would be a command


def test_the_compared_model_has_the_published_sizes():
    """Sizes only: of OLMoE-1B-7B as published, whose expert is 12.6 MB."""
    import transformers

    from real.peers.__main__ import SHAPES

    config = transformers.OlmoeConfig(**SHAPES["olmoe"])
    assert 3 * config.hidden_size * config.intermediate_size * 2 == 12_582_912
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (16, 64, 8)
