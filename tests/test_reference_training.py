"""The recipe's steps that need torch, on tiny models of both architectures: the very code that runs on a GPU."""

import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'foregate[real]')")
pytest.importorskip("transformers", reason="transformers is not installed (pip install 'foregate[real]')")

from test_reference_recipe import packed  # noqa: E402

from traces import DECODE, PREFILL, InputError, load_trace  # noqa: E402
from traces.reference.__main__ import main  # noqa: E402
from traces.reference.experts import NAME, register_training_experts, sort_by_expert, weighted_swiglu  # noqa: E402
from traces.reference.models import MODELS, tiny  # noqa: E402
from traces.reference.recording import held_out_prompts  # noqa: E402
from traces.reference.run import Run  # noqa: E402
from traces.reference.train import build_model, halve, held_out_loss, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FOREVER = 1e12
"""A time that does not end training; steps do."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(params=sorted(MODELS))
def reference(request):
    return tiny(MODELS[request.param])


# --- experts --------------------------------------------------------------------------------------------


def test_pairs_are_grouped_by_expert():
    order, place, ends = sort_by_expert(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    assert place.tolist() == [4, 0, 1, 2, 5, 3]
    assert ends.tolist() == [2, 4, 6, 6]


def gradients_of(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_training_experts_compute_what_the_stock_ones_do(reference):
    """Outputs and every parameter's gradient, in single precision."""
    model = build_model(reference, 64, CPU)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    model.set_experts_implementation("eager")
    expected, stock = gradients_of(model, ids)
    register_training_experts(weighted_swiglu)
    model.set_experts_implementation(NAME)
    found, ours = gradients_of(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


# --- training -------------------------------------------------------------------------------------------


def trained(reference, tokens, until=FOREVER):
    model = build_model(reference, tokens.vocabulary, CPU)
    return model, train(model, reference, tokens, until)


def test_the_same_seed_trains_the_same_model(reference, tokens):
    (one, about), (two, _) = trained(reference, tokens), trained(reference, tokens)
    assert (about["steps"], about["tokens"]) == (4, 4 * 7 * 32)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(two.named_parameters())[name]), name


def test_a_trained_model_is_stock_again_and_in_half_precision(reference, tokens):
    model, _ = trained(reference, tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._experts_implementation == "grouped_mm"
    assert not [module for module in model.modules() if "forward" in vars(module) or module._forward_hooks]


def test_training_lowers_the_loss(reference, tokens):
    """Some tokens are more frequent, which a few steps see."""
    longer = replace(reference, training=replace(reference.training, most_steps=12, peak_rate=0.01))
    untrained = build_model(longer, tokens.vocabulary, CPU)
    halve(untrained)
    before = held_out_loss(untrained, longer, tokens)
    after = held_out_loss(trained(longer, tokens)[0], longer, tokens)
    assert all(after[domain] < before[domain] for domain in before)


def test_time_ends_training(reference, tokens):
    endless = replace(reference, training=replace(reference.training, most_steps=None))
    began = time.monotonic()
    _, about = trained(endless, tokens, began + 1)
    assert about["steps"] >= 1
    assert time.monotonic() - began < 10


def test_too_little_text_is_refused(reference, tmp_path):
    short = packed(tmp_path, train=60)
    with pytest.raises(InputError, match="'one' has 60 tokens; train on above 64"):
        trained(reference, short)
    unheld = packed(tmp_path, segment=30)
    with pytest.raises(InputError, match="'one' has no held-out segment of 33 tokens"):
        held_out_loss(build_model(reference, 64, CPU), reference, unheld)


# --- recording ------------------------------------------------------------------------------------------


def test_prompts_are_held_out_text_of_every_domain(reference, tokens):
    rounds = held_out_prompts(reference, tokens)
    assert [[request.domain for request in one] for one in rounds] == [["one", "two"]] * 2
    held_out = tokens.read("one", "held_out").astype("<u2").tobytes()
    for one in rounds:
        assert len(one[0].token_ids) == 8
        assert np.array(one[0].token_ids, "<u2").tobytes() in held_out
    assert rounds == held_out_prompts(reference, tokens)


def test_a_segment_shorter_than_a_prompt_is_refused(reference, tmp_path):
    with pytest.raises(InputError, match="a held-out segment of 'one' has 5 tokens; a prompt needs 8"):
        held_out_prompts(reference, packed(tmp_path, segment=5))


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory):
    """Both tiny models' runs in one folder."""
    folder = tmp_path_factory.mktemp("recorded")
    for model in MODELS.values():
        Run(tiny(model), tokens, folder, "cpu", time.monotonic()).all(train_until=300, stop_by=600)
    return folder


def test_a_run_records_every_round(whole, reference):
    about = json.loads((whole / f"{reference.name}.run.json").read_text())
    assert about["training"]["steps"] == 4
    assert list(about["held_out_loss"]) == ["one", "two"]
    assert about["reference"]["seed"] == reference.seed
    assert list(about["seconds"]) == ["rehearsal", "training", "validation", "recording", "untrained"]
    for number, said in enumerate(about["recordings"], start=1):
        part = load_trace(whole / f"{reference.name}-{number}.safetensors", verify=True)
        assert (part.hash, part.tokens, part.domains) == (said["hash"], 28, ("one", "two"))
        assert part.provenance.details["part_of"]["hash"] == said["recorded"]


def test_requests_are_recorded_one_after_another_in_half_precision(whole, reference):
    part = load_trace(whole / f"{reference.name}-1.safetensors")
    assert part.request.tolist() == [0] * 14 + [1] * 14
    assert part.position.tolist() == [*range(14)] * 2
    assert part.step.tolist() == [0] * 8 + [1, 2, 3, 4, 5, 6] + [7] * 8 + [8, 9, 10, 11, 12, 13]
    assert part.phase.tolist() == ([PREFILL] * 8 + [DECODE] * 6) * 2
    assert {part.weights.dtype, part.router_logits.dtype, part.expert_output_norm.dtype} == {np.dtype(np.float16)}
    assert part.lookahead_experts.shape == (28, 3, 2, 4)


def test_weights_are_those_of_the_architecture(whole, reference):
    sums = load_trace(whole / f"{reference.name}-1.safetensors").weights.astype(np.float32).sum(axis=-1)
    assert (sums == pytest.approx(1, abs=0.01)) == reference.shape["norm_topk_prob"]


def test_the_control_runs_the_same_tokens_through_initial_weights(whole, reference):
    part = load_trace(whole / f"{reference.name}-1.safetensors")
    control = load_trace(whole / f"{reference.name}-untrained.safetensors")
    np.testing.assert_array_equal(control.token_ids, part.token_ids)
    assert set(control.phase.tolist()) == {PREFILL}
    assert control.model.name.startswith("UNTRAINED")
    assert (control.experts != part.experts).any()


def test_a_run_is_bundled_and_compared(whole, reference, tmp_path, capsys):
    name = reference.name.removeprefix("tiny_")
    target = tmp_path / "part.safetensors"
    assert main(["bundle", name, "--tiny", "--folder", str(whole), "--target", str(target)]) == 0
    part = load_trace(target, verify=True)
    assert (part.tokens, part.model.layers, part.model.name) == (24, 3, reference.title)
    assert main(["evidence", name, "--tiny", "--folder", str(whole)]) == 0
    assert "foretold 2 ahead, best k" in capsys.readouterr().out


def test_no_batch_begins_without_time_to_end_it(tokens, tmp_path, reference, monkeypatch):
    """Every look at the clock takes a second: the first batch begins at 3 and ends at 6, the next could begin at 7."""
    second = 1e9  # far beyond what the steps take in truth
    clock = itertools.count(0, second)
    monkeypatch.setattr("traces.reference.run.time", SimpleNamespace(monotonic=lambda: next(clock)))
    one_by_one = replace(reference, recording=replace(reference.recording, rounds_per_batch=1))
    about = Run(one_by_one, tokens, tmp_path, "cpu", 0).all(train_until=second, stop_by=9 * second)
    assert len(about["recordings"]) == 1


def test_no_time_to_train_is_refused(tokens, reference):
    with pytest.raises(InputError, match="no time is left to train; let training end later"):
        trained(reference, tokens, time.monotonic())


def test_time_that_ends_before_training_does_is_refused(tokens, tmp_path, reference):
    with pytest.raises(InputError, match="train-until is 9 s; it must be above 0 and below stop-by, 8 s"):
        Run(reference, tokens, tmp_path, "cpu", time.monotonic()).all(train_until=9, stop_by=8)
