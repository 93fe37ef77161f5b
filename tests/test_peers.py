"""The comparison with other ways of offloading: every arm, through the same code as on a GPU, and what the rows say."""

# ruff: noqa: E402  # what must be there comes first

import json

import pytest

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")
pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")
pytest.importorskip("accelerate", reason="an arm is accelerate's")

from real.peers.__main__ import build_model, main, run_arm
from real.peers.arms import Accelerate, Ours, PerLayerLRU, PolicyLang, Resident, all_arms
from real.peers.report import summarise, table
from traces import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

PROMPTS = [[5, 9, 3, 17, 22, 60], [7, 8, 9, 100, 90]]


@pytest.fixture(scope="module")
def model():
    built = build_model("tiny", "cpu")
    yield built
    built.close()


@pytest.mark.parametrize(
    "arm",
    [
        Resident("grouped_mm"),
        Resident("batched_mm"),
        PerLayerLRU(0.25, write_back=True),
        PerLayerLRU(0.5, write_back=False),
        Accelerate(),
        Ours("lru", 1.0, graphs=False),
        Ours("next_gate_lrfu", 0.5, graphs=False),
    ],
    ids=lambda arm: arm.name,
)
def test_every_arm_generates_the_same_tokens_and_leaves_the_model_as_it_was(model, arm):
    expected = run_arm(Resident("eager"), model, PROMPTS, 8)["tokens"]
    row = run_arm(arm, model, PROMPTS, 8)
    assert row["tokens"] == expected[: len(row["tokens"])]
    assert len(row["tokens"]) == row["decoded"] + 1 >= 3
    assert all(list(layer.experts.parameters()) == [] for layer in model.layers)
    assert not any(hasattr(module, "_hf_hook") for module in model.model.modules())
    if arm.offloads and not isinstance(arm, Accelerate):
        assert 0 < row["hit_rate"] < 1
        assert row["bytes_h2d"] > 0


def test_a_per_layer_lru_counts_what_it_moves(model):
    """At 0.25 a layer has two slots for two experts a token: whatever the last token did not use is loaded."""
    row = run_arm(PerLayerLRU(0.25, write_back=True), model, PROMPTS, 16)
    assert row["bytes_d2h"] == row["bytes_h2d"]
    needed = row["decoded"] * len(model.layers) * model.top_k
    assert row["bytes_h2d"] == round((1 - row["hit_rate"]) * needed) * model.layout.expert_bytes


def test_an_arm_whose_package_is_missing_says_so(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "moe_policylang", None)
    with pytest.raises(InputError, match="the package moe_policylang is not installed"):
        run_arm(PolicyLang(0.25, pinned=False), model, PROMPTS, 8)


def test_arms_have_different_names_and_the_same_slots_at_a_budget(model):
    arms = all_arms((0.25, 0.5))
    assert len({arm.name for arm in arms}) == len(arms)
    equal = (PerLayerLRU(0.5, write_back=False), Ours("lru", 0.5, graphs=False))
    assert len({run_arm(arm, model, PROMPTS, 6)["device_expert_bytes"] for arm in equal}) == 1


def test_the_command_writes_rows_and_a_summary(tmp_path, capsys):
    words = [
        "--where",
        "cpu",
        "--shape",
        "tiny",
        "--repeats",
        "2",
        "--prompt-tokens",
        "6",
        "--new-tokens",
        "6",
        "--skip-identity",
    ]
    assert (
        main(["--out", str(tmp_path), *words, "--only", "resident eager,resident foregate,per-layer lru,foregate lru"]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["repeat"] for row in rows} == {0, 1}
    assert summary["errors"] == []
    assert all(arm["equals_resident_eager"] for arm in summary["arms"])
    assert summary["over_best_peer"]["0.5"]["peer"].startswith("per-layer lru")
    assert "budget 0.25: foregate" in capsys.readouterr().out


def row(arm, speed, repeat, **more):
    return {
        "arm": arm,
        "offloads": not arm.startswith("resident"),
        "budget": 0.25,
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
    live = {"hit_rate": 0.5, "link_bytes_per_s": 1e9, "host_per_layer_ns": {"await_gate": 1.0}}
    rows = [
        row("resident eager", 20.0, 1),
        row("resident foregate, graphs", 200.0, 1, bytes_h2d=0, graphs=True, **live),
        row("foregate lru, graphs, 0.25", 1.0, 0, bytes_h2d=10**8, graphs=True, **live),
        row("foregate lru, graphs, 0.25", 80.0, 1, bytes_h2d=10**8, graphs=True, **live),
        row("foregate lru, graphs, 0.25", 90.0, 2, bytes_h2d=10**8, graphs=True, **live),
        row("foregate lru, eager, 0.25", 30.0, 1, bytes_h2d=10**8, graphs=False, **live),
        row("per-layer lru, no write-back, 0.25", 17.0, 1),
        row("accelerate cpu offload", 1.0, 1) | {"budget": None, "tokens": [1, 9]},
        {"arm": "moe-policylang", "error": "InputError: not there", "repeat": 0},
    ]
    found = summarise(rows)
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert arms["foregate lru, graphs, 0.25"]["tokens_per_s"] == 85.0
    assert arms["foregate lru, graphs, 0.25"]["of_bound"] == pytest.approx(85 * max(1 / 200, 10**7 / 1e9))
    assert found["over_best_peer"] == {
        "0.25": {
            "ours": "foregate lru, graphs, 0.25",
            "peer": "per-layer lru, no write-back, 0.25",
            "ratio": 5.0,
            "equal_kernels": pytest.approx(30 / 17),
        }
    }
    assert arms["accelerate cpu offload"]["equals_resident_eager"] is False
    assert found["errors"] == [{"arm": "moe-policylang", "error": "InputError: not there", "repeat": 0}]
    text = table(found)
    assert "| foregate lru, graphs, 0.25 | 85.0 | 80.0 to 90.0 | 0.500 | 10 | 1.0 | yes | 85% |" in text
    assert "is 5.00 times" in text


def test_the_compared_model_has_the_published_sizes():
    """Sizes only: of OLMoE-1B-7B as published, whose expert is 12.6 MB."""
    import transformers

    from real.peers.__main__ import SHAPES

    config = transformers.OlmoeConfig(**SHAPES["olmoe"])
    assert 3 * config.hidden_size * config.intermediate_size * 2 == 12_582_912
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (16, 64, 8)
