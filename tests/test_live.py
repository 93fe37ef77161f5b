"""Live mode on the stand-in: tokens that no system changes, experts that are never on the device, failures in a sentence."""

# ruff: noqa: E402  # what must be there comes first

import gc
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")
transformers = pytest.importorskip("transformers", reason="live mode needs transformers (the extra `real`)")

from capturing import Recorder
from tiny_models import tiny_model

import real.identity
import real.live.decoder
from policies.contract import needs
from policies.predictor.cross_layer_gate import CrossLayerGate
from policies.system import AXES, build_system, find_part
from real.device import Device
from real.generate import main
from real.identity import failed, small_model
from real.live.decoder import LiveDecoder
from real.live.model import load_model, random_model
from real.live.run import LiveRun
from real.live.sight import Sight
from real.schedule import HazardError, Schedule
from real.slab import HostSlab
from real.standin import StandIn
from real.systems import FLAGS, composition, read_system
from sim.budget import slots_within
from sim.cli import main as foregate
from sim.config import compose_config, options
from sim.conformance import costs_for
from sim.reference import run_reference
from sim.workload import make_workload
from traces import InputError, RecordOptions, record
from traces.recorder import Prompt

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

PROMPTS = [[5, 9, 3, 17, 22, 60, 61, 8, 9, 10, 33], [7, 8, 9]]
NEW_TOKENS = 5

LOADED = ("mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h")
"""Transposed with biases (gpt_oss), a router that returns in another order (granitemoe), ungated (nemotron_h), a dense first
layer (deepseek_v2); checkpoints of single and of stacked experts."""
CAPTURED = ("mixtral", "deepseek_v2", "granitemoe", "minimax_m2")


@pytest.fixture(scope="module", params=LOADED)
def saved(request, tmp_path_factory):
    """Return architecture, resident model and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    architecture = request.param
    model = small_model(architecture) if architecture == "nemotron_h" else tiny_model(architecture)
    model.save_pretrained(folder)
    return architecture, model, folder


@pytest.fixture(scope="module")
def loaded(saved):
    live = load_model(str(saved[2]), "cpu")
    yield live
    live.close()


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe").save_pretrained(folder)
    live = load_model(str(folder), "cpu")
    yield live
    live.close()


def generate(live, system="lru", slots=None, forced=None, **options):
    """Return the tokens of all prompts, the counts and the notes."""
    everything = len(live.layers) * live.experts
    with LiveRun(
        live,
        composition(read_system(system)),
        everything if slots is None else slots,
        **{"requests": len(PROMPTS), "new_tokens": NEW_TOKENS, "most_prompt_tokens": 11, **options},
    ) as run:
        tokens = [run.request(prompt, forced=forced).tokens for prompt in PROMPTS]
        return tokens, run.outcome(), run.notes


def generated_by_transformers(model):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_no_expert_is_on_the_device_after_loading_and_the_slab_has_all(saved, loaded):
    _, model, _ = saved
    assert [layer.name for layer in loaded.layers]
    for index, layer in enumerate(loaded.layers):
        assert list(layer.experts.parameters()) == []
        resident = dict(model.get_submodule(layer.name).named_parameters())
        fused = loaded.fused(index, "cpu")
        assert fused.keys() == resident.keys()
        assert all(torch.equal(fused[name], resident[name]) for name in fused)


def test_tokens_are_the_resident_models_whatever_the_system(saved, loaded):
    """With a quarter and half of all experts, slots proved; a prompt of eleven tokens needs waves of two experts."""
    _, model, _ = saved
    everything = len(loaded.layers) * loaded.experts
    resident, counts, _ = generate(loaded, preload=True)
    assert counts.misses.sum() == 0
    assert resident == generated_by_transformers(model)
    for system, share in (("lru_per_layer", 0.25), ("next_gate_lrfu", 0.25), ("fate", 0.5)):
        device = StandIn("random", seed=1, schedule=Schedule(loaded.layout.expert_bytes))
        tokens, counts, _ = generate(loaded, system, int(share * everything), device=device)
        assert tokens == resident, system
        assert counts.misses.sum() > 0
        assert device.schedule.reads > counts.misses.sum()
    assert counts.prefetches > 0


@pytest.mark.parametrize("architecture", CAPTURED)
def test_captured_passes_give_the_same_tokens(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path)
    live = load_model(str(tmp_path), "cpu")
    everything = len(live.layers) * live.experts
    resident, _, _ = generate(live, preload=True)
    for system in ("lru_per_layer", "next_gate_lrfu"):
        tokens, counts, notes = generate(live, system, everything // 4, graphs=True, recorder=Recorder(), prove=True)
        assert (tokens, notes) == (resident, [])
        assert counts.misses.sum() > 0
    live.close()


def test_a_model_that_cannot_be_captured_runs_without_graphs_and_says_why(tmp_path):
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    live = load_model(str(tmp_path), "cpu")
    tokens, _, notes = generate(live, slots=8, graphs=True, recorder=Recorder())
    assert tokens == generate(live, preload=True)[0]
    assert notes == ["without graphs: its cache has a StaticSlidingWindowLayer, which keeps its place on the host"]
    live.close()


def test_without_a_gpu_graphs_are_left_out_with_a_note(olmoe):
    tokens, _, notes = generate(olmoe, slots=8, graphs=True)
    assert tokens == generate(olmoe, preload=True)[0]
    assert notes == ["without graphs: there are no graphs on a CPU"]


def test_experts_that_forget_a_wait_are_a_hazard(olmoe, monkeypatch):
    monkeypatch.setattr(Device, "wait", lambda *_: None)
    device = StandIn("lazy", schedule=Schedule(olmoe.layout.expert_bytes))
    with pytest.raises(HazardError, match="before it is filled"):
        generate(olmoe, slots=8, device=device)


def test_identity_is_proved_by_runs_that_bring_experts_again_and_by_no_others(monkeypatch):
    monkeypatch.setattr(real.identity, "SYSTEMS", ("lru_per_layer",))
    row = real.identity.check_identity("granitemoe", "cpu", graphs=False, dtype="float32")
    assert (row["runs"], row["different"], row["unproved"]) == (2, [], [])
    assert row["misses"] > 0
    assert not failed(row)
    monkeypatch.setattr(real.identity, "BUDGETS", (0.5, 1.0))
    row = real.identity.check_identity("granitemoe", "cpu", graphs=False, dtype="float32")
    assert row["unproved"] == ["lru_per_layer at 1.0"]
    assert failed(row)
    assert failed({"architecture": "granitemoe", "error": "InputError: no"})


# ---- forced tokens and a known future ----------------------------------------------------------------------------

FORCED = [[90, 4, 4, 71], [12, 13]]


def run_forced(live, system, slots, **options):
    """Return the likeliest tokens of all passes, how many decode steps each request had, counts, and the run's own view."""
    with LiveRun(
        live,
        composition(read_system(system)),
        slots,
        **{"requests": 2, "new_tokens": NEW_TOKENS, "most_prompt_tokens": 11, **options},
    ) as run:
        tokens = [run.request(prompt, forced=forced).tokens for prompt, forced in zip(PROMPTS, FORCED, strict=True)]
        steps = [run.decode_steps(request) for request in range(2)]
        return tokens, steps, run.outcome(), run.routing(), run.unforeseen()


@pytest.mark.parametrize("graphs", [False, True])
def test_forced_tokens_are_fed_whatever_the_passes_give(olmoe, graphs):
    """What is returned is the likeliest token of every pass: that of one pass of transformers' own over all the tokens."""
    model, expected = tiny_model("olmoe"), []
    for prompt, forced in zip(PROMPTS, FORCED, strict=True):
        likeliest = model(input_ids=torch.tensor([prompt + forced])).logits[0].argmax(-1)
        expected.append(likeliest[len(prompt) - 1 :].tolist())
    options = {"graphs": graphs, "recorder": Recorder() if graphs else None}
    tokens, steps, counts, _, _ = run_forced(olmoe, "lru", 8, prove=True, **options)
    assert tokens == expected
    assert steps == [slice(1, 5), slice(6, 8)]
    assert counts.misses[5] > 0
    assert not counts.misses[8:].any()
    greedy = generate(olmoe, slots=8)[0]
    with LiveRun(
        olmoe, composition(read_system("lru")), 8, requests=2, new_tokens=NEW_TOKENS, most_prompt_tokens=11, **options
    ) as run:
        assert [run.request(PROMPTS[0]).tokens, run.request(PROMPTS[1], forced=greedy[1][:-1]).tokens] == greedy


def test_more_forced_tokens_than_announced_are_refused(olmoe):
    with pytest.raises(InputError, match="5 tokens are forced; the run was set up for at most 4"):
        generate(olmoe, slots=8, forced=[1, 2, 3, 4, 5])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_system_that_knows_the_future_runs_on_what_a_run_before_recorded(olmoe, graphs):
    options = {"graphs": graphs, "recorder": Recorder() if graphs else None, "prove": True}
    expected, _, _, future, _ = run_forced(olmoe, "lru", 32, preload=True, **options)
    assert len(future.offsets) == (2 + 4 + 2) * len(olmoe.layers) + 1
    tokens, _, counts, again, unforeseen = run_forced(olmoe, "clairvoyant", 16, future=future, **options)
    assert (tokens, unforeseen) == (expected, 0)
    assert again.offsets.tolist() == future.offsets.tolist()
    assert counts.predicted == counts.predicted_and_needed > 0
    assert 0 < counts.misses.sum() < run_forced(olmoe, "lru", 16, **options)[2].misses.sum()


def test_what_the_future_did_not_say_is_counted_and_passes_beyond_it_are_refused(olmoe):
    _, _, _, future, _ = run_forced(olmoe, "lru", 32, preload=True)
    wrong = future._replace(keys=future.keys.copy())
    start, stop = wrong.offsets[4:6]  # the first layer of the first decode pass
    wrong.keys[start] = next(key for key in range(olmoe.experts) if key not in wrong.keys[start:stop])
    tokens, _, _, _, unforeseen = run_forced(olmoe, "perfect_prediction", 16, future=wrong)
    assert unforeseen == 1
    assert tokens == run_forced(olmoe, "lru", 32)[0]
    with pytest.raises(InputError, match="pass 9 is not among those that were recorded"):
        generate(olmoe, "clairvoyant", 16, future=future)


# ---- decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["lru", "lrfu", "lru_per_layer"])
def test_decisions_are_the_simulators_on_the_models_recording(olmoe, tmp_path, system):
    """The trace is recorded from the resident model by transformers' own kernel."""
    prompts = [Prompt(f"prompt {place}", None, tuple(prompt)) for place, prompt in enumerate(PROMPTS)]
    options = RecordOptions(new_tokens=NEW_TOKENS - 1, stop_at_end=False, lookahead=1)
    trace = record(tiny_model("olmoe"), prompts, tmp_path / "trace.safetensors", options)
    workload = make_workload(trace)
    parts = composition(read_system(system))
    slots = len(olmoe.layers) * olmoe.experts // 2
    simulated = []
    built = build_system(parts, slots=slots, layers=trace.model.layers, experts=trace.model.experts, top_k=trace.model.top_k)
    run_reference(built, workload, costs_for(workload), simulated)
    with LiveRun(olmoe, parts, slots, requests=2, new_tokens=NEW_TOKENS, most_prompt_tokens=11) as run:
        for prompt in PROMPTS:
            run.request(prompt)
        live = run.log

    def decisions(log):
        return [entry[1:] for entry in log if entry[1] in ("hit", "late_hit", "miss", "load", "evict")]

    assert decisions(live) == decisions(simulated)
    assert any(what == "evict" for what, *_ in decisions(live))


@needs("weights", "logits", "lookahead")
class SeesEverything(CrossLayerGate):
    """Predicts as the cross-layer gate does, and declares all that can be seen."""


class Patient(StandIn):
    """Lets the host look as often as it likes."""

    def idle(self):
        pass


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("graphs", [False, True])
def test_predictors_see_what_the_recorder_records(architecture, graphs, tmp_path, monkeypatch):
    """However late it comes: twice the host looks in vain."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "model")
    options = RecordOptions(new_tokens=NEW_TOKENS - 1, stop_at_end=False, lookahead=2, router_logits="float32")
    trace = record(model, [Prompt("prompt", None, tuple(PROMPTS[0]))], tmp_path / "trace.safetensors", options)
    system = composition(read_system("next_gate", ["prefetch.depth=2"]))
    sees = find_part("predictor", {"_target_": f"{__name__}.SeesEverything"}, also_from=(__name__,))
    seen, looks, read_sight = [], Counter(), LiveDecoder.read_sight

    def late(decoder, step, layer):
        looks[step, layer] += 1
        return looks[step, layer] > 2 and read_sight(decoder, step, layer)

    monkeypatch.setattr(LiveDecoder, "read_sight", late)
    live = load_model(str(tmp_path / "model"), "cpu")
    with LiveRun(
        live,
        replace(system, parts={**system.parts, "predictor": sees}),
        16,
        requests=2,
        new_tokens=NEW_TOKENS,
        most_prompt_tokens=11,
        graphs=graphs,
        recorder=Recorder() if graphs else None,
        device=Patient("eager"),
    ) as run:
        look_ahead = run.executor.decisions.look_ahead

        def watch(step, layer, now):
            seen.append((step, layer, [rows[: run.decoder.count].copy() for rows in run.decoder.sight.observed]))
            return look_ahead(step, layer, now)

        run.executor.decisions.look_ahead = watch
        tokens = [run.request(PROMPTS[0]).tokens for _ in range(2)]
        assert run.graphs == graphs
        assert run.decoder.sight._router_inputs == {}
    live.close()
    assert tokens[0] == tokens[1]
    layers = trace.model.layers
    assert [where[:2] for where in seen] == [(step, layer) for step in range(2 * NEW_TOKENS) for layer in range(layers)]
    assert set(looks.values()) == {3}
    for step, layer, observed in seen:
        mine = trace.step == step % NEW_TOKENS
        assert observed[2].tolist() == [step // NEW_TOKENS] * mine.sum()
        for place, recorded in (
            (0, trace.experts),
            (1, trace.weights),
            (3, trace.lookahead_experts),
            (4, trace.lookahead_scores),
            (5, trace.router_logits),
        ):
            shown = observed[place][:, layer]
            if place == 4:
                shown = np.maximum(shown, 0)  # beyond the last layer
            np.testing.assert_allclose(shown, recorded[mine, layer].astype(shown.dtype), rtol=2e-3, atol=2e-3)


def test_a_system_that_looks_nowhere_keeps_nothing_of_the_routers(olmoe):
    with LiveRun(
        olmoe,
        composition(read_system("next_gate", ["prefetch.depth=0"])),
        16,
        requests=1,
        new_tokens=NEW_TOKENS,
        most_prompt_tokens=11,
    ) as run:
        run.request(PROMPTS[0])
        assert run.decoder.sight._router_inputs == {}


def test_experts_that_are_called_without_their_router_are_refused(olmoe, monkeypatch):
    monkeypatch.setattr(Sight, "_on_router", lambda sight, index: lambda *what: None)
    with pytest.raises(InputError, match=r"layers.0.mlp.experts were called without its router, so nobody knows"):
        generate(olmoe, "next_gate", 16)


def test_the_link_has_its_demands_before_the_host_waits_for_what_predictors_see(olmoe, monkeypatch):
    looks, waiting = [], []
    read_sight = LiveDecoder.read_sight

    def watch(decoder, step, layer):
        found = read_sight(decoder, step, layer)
        looks.append((step * len(olmoe.layers) + layer, found, len(runs[0].log)))
        return found

    publish_sight = LiveDecoder.publish_sight

    def published(decoder, step, layer):
        waiting.append(len(runs[0].executor.link.demand))
        publish_sight(decoder, step, layer)

    monkeypatch.setattr(LiveDecoder, "read_sight", watch)
    monkeypatch.setattr(LiveDecoder, "publish_sight", published)
    with LiveRun(
        olmoe,
        composition(read_system("next_gate")),
        16,
        requests=1,
        new_tokens=NEW_TOKENS,
        most_prompt_tokens=11,
        device=StandIn("lazy"),  # whose compute stream runs a piece whenever the host looks
    ) as run:
        runs = [run]
        run.request(PROMPTS[0][:2])
        assert set(waiting) == {0}
        log = list(run.log)
    for event, found, noted in looks:
        misses = [key for _, what, key, of in log if (what, of) == ("miss", event)]
        known = [key for _, what, key, of in log[:noted] if of == event and what in ("load", "prefetch")]
        assert found or set(misses) <= set(known)
    assert sum(not found for _, found, _ in looks) >= NEW_TOKENS
    assert [event for event, found, _ in looks if found] == list(range(NEW_TOKENS * len(olmoe.layers)))


@pytest.mark.parametrize("name", options("system"))
def test_systems_are_read_as_hydra_composes_them(name):
    config = compose_config("simulate", [f"system={name}"])
    if config["free_link"]:
        with pytest.raises(InputError, match="needs a link that takes no time"):
            read_system(name)
        return
    expected = {flag: config[flag] for flag in FLAGS} | {axis: config[axis] for axis in AXES}
    assert read_system(name) == {"name": config["system"]["name"], **expected}


def test_a_system_is_changed_as_on_the_command_line():
    overrides = ["eviction=lfu", "prefetch.depth=2"]
    config = compose_config("simulate", ["system=next_gate", *overrides])
    expected = {flag: config[flag] for flag in FLAGS} | {axis: config[axis] for axis in AXES}
    assert read_system("next_gate", overrides) == {"name": config["system"]["name"], **expected}


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["belady", "clairvoyant"])
def test_a_system_that_needs_the_future_is_refused(olmoe, system):
    with pytest.raises(InputError, match="needs to know what the router will choose, which nobody knows"):
        generate(olmoe, system, 16)


def test_a_model_outside_the_experts_interface_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no MoE layers"):
        load_model(str(tmp_path), "cpu")


def test_a_checkpoint_that_lacks_experts_is_refused_and_its_memory_released(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    tiny_model("granitemoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "layers.2" in name and "output_linear" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    closed = []
    monkeypatch.setattr(HostSlab, "close", lambda slab: closed.append(slab))
    with pytest.raises(InputError, match=r"the checkpoint has no model\.layers\.2\..*experts\.down_proj"):
        load_model(str(tmp_path), "cpu")
    assert len(closed) == 1


def test_experts_classes_are_as_before_after_loading(saved, loaded):
    layer = loaded.layers[0]
    assert "__setattr__" not in type(layer.experts).__dict__
    assert tiny_model("mixtral").model.layers[0].mlp.experts.gate_up_proj.shape[0] == 8


def test_the_models_own_generate_says_that_no_run_serves_it(olmoe):
    with pytest.raises(InputError, match="the experts are in host memory and no run serves them"):
        olmoe.model(input_ids=torch.tensor([[1, 2]]))


def test_after_a_failure_or_an_interruption_nothing_is_left_and_the_next_run_is_right(olmoe, monkeypatch):
    expected = generate(olmoe, preload=True)[0]
    with pytest.raises(InputError, match="a host-to-device copy failed"):
        generate(olmoe, slots=8, device=StandIn(fail_at_copy=9))
    record_ticket, calls = Device.record, iter(range(10**6))

    def interrupt(device, stream):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return record_ticket(device, stream)

    monkeypatch.setattr(Device, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(olmoe, slots=8)
    monkeypatch.undo()
    gc.collect()
    left = [found for found in gc.get_objects() if isinstance(found, real.live.decoder.LiveDecoder)]
    assert left == []
    assert all(layer.experts.foregate_server is None for layer in olmoe.layers)
    assert not any(module._forward_hooks for module in olmoe.model.modules())
    assert generate(olmoe, slots=8)[0] == expected


def test_a_budget_of_less_than_top_k_experts_is_refused(olmoe):
    with pytest.raises(InputError, match="budget gives 1 expert slots, but one event needs 2"):
        generate(olmoe, slots=1)


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_generates_and_checks(tmp_path, capsys):
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in PROMPTS))
    words = ["--model", str(tmp_path / "model"), "--prompts", str(prompts), "--where", "cpu", "--new-tokens", "3"]
    assert main([*words, "--check", "--budget", "0.5", "eviction=lrfu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["system"] == "lru+eviction=lrfu"
    assert result["slots"] == slots_within(0.5, 32, 1) == 16
    assert [len(tokens) for tokens in result["tokens"]] == [3, 3]
    for words_, sentence in (
        (["--new-tokens", "0"], "new_tokens is 0"),
        (["--budget", "3"], "as a fraction it is above 1"),
        (["--system", "lro"], "system is 'lro'"),
        (["--model", "/nowhere"], "there is no folder /nowhere"),
        (["evicton=lru"], "is no part of a system"),
    ):
        assert main([*words, *words_]) == 2
        assert sentence in capsys.readouterr().err


def test_nothing_of_the_command_line_is_imported():
    """Nor what else the GPU's machine lacks, by any of the commands that run there."""
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'antlr4', 'simpy', 'platformdirs', 'joblib'): sys.modules[name] = None\n"
        "import real.replay, real.standin, real.selftest\n"
        "import real.generate, real.identity, real.peers.__main__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_of_a_configuration_alone_has_random_experts_in_host_memory():
    config = transformers.OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    live = random_model(config, "cpu", dtype=torch.float32, seed=3)
    assert live.tensors["gate_up_proj"].std() > 0
    assert torch.isfinite(live.model.model.rotary_emb.inv_freq).all()
    assert live.top_k == 2
    live.close()


def test_prompt_lengths_and_requests_are_those_that_were_announced(olmoe):
    with pytest.raises(InputError, match="a prompt has 11 tokens; the run was set up for at most 4"):
        generate(olmoe, slots=8, most_prompt_tokens=4)
    with pytest.raises(InputError, match="set up for 1 requests"):
        generate(olmoe, slots=8, requests=1)


def test_the_verb_composes_the_system_and_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"token_ids": PROMPTS[1]}) + "\n")
    monkeypatch.chdir(tmp_path)
    words = ["generate", f"model={tmp_path / 'model'}", f"prompts={prompts}", "device=cpu", "new_tokens=3"]
    assert foregate([*words, "system=next_gate_lrfu", "check=true", "budget=0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["system"], result["slots"]) == ("next_gate_lrfu", 16)
    assert foregate([word.replace("device=cpu", "device=auto") for word in words]) == 0
    assert ("everything runs on the CPU, and the times mean nothing" in capsys.readouterr().err) != torch.cuda.is_available()
    for change, sentence in (
        ("system=belady", "needs to know what the router will choose"),
        ("system=infinite_bandwidth", "needs a link that takes no time"),
        ("device=gpu", "device is 'gpu': it must be auto, cuda or cpu"),
        ("graphs=maybe", "graphs is 'maybe': it must be true or false"),
    ):
        assert foregate([*words, change]) == 2
        assert sentence in capsys.readouterr().err
