"""Recording: prompts, batches, generation, kills and full disks, and what is refused."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="recording needs torch")
pytest.importorskip("transformers", reason="recording needs transformers")

import torch
import transformers
from tiny_models import COMMON, EXPERTS, TOP_K, VOCABULARY, tiny_model

from sim.cli import main
from traces import DECODE, PREFILL, InputError, RecordOptions, load_trace, record
from traces.checks import present_arrays
from traces.recorder import Prompt, columns, lookahead, read_prompts, recording
from traces.recorder.batches import BatchRows
from traces.recorder.generation import forward_passes
from traces.recorder.layers import moe_layers
from traces.recorder.routers import rank

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Path(__file__).parents[1]

LENGTHS = (5, 9, 3, 7, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved tiny model."""
    folder = tmp_path_factory.mktemp("olmoe") / "tiny_olmoe"
    tiny_model("olmoe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return transformers.AutoModelForCausalLM.from_pretrained(saved).eval()


@pytest.fixture(scope="module")
def prompts():
    tokens = [np.random.default_rng(n).integers(3, VOCABULARY, n).tolist() for n in LENGTHS]
    return [Prompt(f"prompt {n}", None, tuple(ids), f"domain {n}") for n, ids in enumerate(tokens)]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "trace.safetensors"


@pytest.fixture
def prompt_file(tmp_path, prompts):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"token_ids": prompt.token_ids, "domain": prompt.domain}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
    return path


def arrays_of(trace):
    return {name: array.copy() for name, array in present_arrays(trace).items()}


def assert_same_arrays(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one prompt\n\n  two\n")
    assert read_prompts(path) == [
        Prompt(f"{path}, line 1", "one prompt", None),
        Prompt(f"{path}, line 3", "  two", None),
    ]


def test_prompts_of_a_jsonl_file_are_texts_or_token_ids_with_domains(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "say", "domain": "code"}\n{"token_ids": [4, 0]}\n')
    assert read_prompts(path) == [
        Prompt(f"{path}, line 1", "say", None, "code"),
        Prompt(f"{path}, line 2", None, (4, 0)),
    ]


WRONG_LINES = {
    '{"prompt": "a"': "this is not JSON (",
    "[1]": 'this is no JSON object; write {"prompt": TEXT}',
    "{}": "there must be either prompt or token_ids",
    '{"prompt": "a", "token_ids": [1]}': "there must be either prompt or token_ids",
    '{"promt": "a"}': "unknown field 'promt'; did you mean 'prompt'? known: domain, prompt, token_ids",
    '{"prompt": 3}': "prompt is 3; it must be a text",
    '{"prompt": "a", "domain": null}': "domain is None; it must be a text",
    '{"token_ids": [1, -1]}': "token_ids is [1, -1]; it must be a list of whole numbers from 0",
    '{"token_ids": "12"}': "token_ids is '12'; it must be a list of whole numbers from 0",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 2: {WRONG_LINES[line]}")


# ---- what is recorded ----------------------------------------------------------------------------------------------


def test_batches_and_steps(model, prompts, out):
    trace = record(model, prompts, out, RecordOptions(batch_size=2, new_tokens=3, stop_at_end=False), name="tiny")
    assert (trace.tokens, trace.steps) == (sum(LENGTHS) + 5 * 3, 3 * 4)
    assert trace.domains == tuple(prompt.domain for prompt in prompts)
    for request, length in enumerate(LENGTHS):
        mine = trace.request == request
        assert trace.position[mine].tolist() == list(range(length + 3))
        assert trace.phase[mine].tolist() == [PREFILL] * length + [DECODE] * 3
        first = 4 * (request // 2)
        assert trace.step[mine].tolist() == [first] * length + [first + 1, first + 2, first + 3]
    assert (trace.provenance.kind, trace.model.name) == ("recorded", "tiny")
    assert trace.provenance.details["new_tokens"] == 3


def test_a_prompt_alone_is_routed_as_in_the_padded_batch(model, prompts, tmp_path):
    """Padding neither is recorded nor disturbs its neighbours: routing agrees, weights up to rounding."""
    options = {"new_tokens": 4, "stop_at_end": False}
    alone = record(model, prompts, tmp_path / "a.safetensors", RecordOptions(batch_size=1, **options))
    together = record(model, prompts, tmp_path / "b.safetensors", RecordOptions(batch_size=5, **options))
    for request in range(len(prompts)):
        mine, theirs = alone.request == request, together.request == request
        np.testing.assert_array_equal(alone.token_ids[mine], together.token_ids[theirs])
        np.testing.assert_array_equal(alone.experts[mine], together.experts[theirs])
        np.testing.assert_allclose(alone.weights[mine], together.weights[theirs], rtol=1e-4)


def test_what_is_asked_for_does_not_change_what_is_recorded_anyway(model, prompts, tmp_path):
    plain = arrays_of(record(model, prompts, tmp_path / "a.safetensors", RecordOptions(batch_size=2, new_tokens=4)))
    options = RecordOptions(
        batch_size=2, new_tokens=4, router_logits="float16", lookahead=3, expert_output_norm=True, residual_cosine=True
    )
    full = arrays_of(record(model, prompts, tmp_path / "b.safetensors", options))
    assert set(full) - set(plain) == {
        "router_logits",
        "lookahead_experts",
        "lookahead_scores",
        "expert_output_norm",
        "residual_cosine",
    }
    assert_same_arrays(plain, {name: full[name] for name in plain})
    assert full["lookahead_experts"].shape[1:] == (4, 3, 2 * TOP_K)


def test_long_generation_is_collected_many_passes_at_a_time(model, prompts, tmp_path, monkeypatch):
    """How much is held on the device changes nothing."""
    options = RecordOptions(batch_size=2, new_tokens=21, temperature=1.0, seed=3, lookahead=2)
    held = arrays_of(record(model, prompts, tmp_path / "a.safetensors", options))
    monkeypatch.setattr(recording, "DECODE_PASSES_HELD", 1)
    monkeypatch.setattr(lookahead, "SCORES_HELD", 1)
    assert_same_arrays(held, arrays_of(record(model, prompts, tmp_path / "b.safetensors", options)))
    assert held["position"].max() >= 21


def test_a_request_ends_before_its_end_token(model, prompts, out, tmp_path):
    """The end token is where generation stops; the neighbours in the batch go on."""
    options = {"batch_size": 5, "new_tokens": 12, "temperature": 2.0, "seed": 1}
    endless = record(model, prompts, tmp_path / "endless.safetensors", RecordOptions(stop_at_end=False, **options))
    decoded = {r: endless.token_ids[(endless.request == r) & (endless.phase == DECODE)].tolist() for r in range(5)}
    ends = [decoded[0][5], decoded[1][0]]
    model.generation_config.eos_token_id = ends
    try:
        ended = record(model, prompts, out, RecordOptions(**options))
    finally:
        model.generation_config.eos_token_id = COMMON["eos_token_id"]
    for request, tokens in decoded.items():
        until = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
        mine = ended.request == request
        assert ended.token_ids[mine & (ended.phase == DECODE)].tolist() == tokens[:until]
    assert (ended.request == 1).sum() == LENGTHS[1]  # nothing decoded at all


def test_rows_of_a_batch_whose_requests_all_end():
    rows = BatchRows([2, 1], first_request=4, first_step=7, end_tokens=frozenset([9]))
    (prefill,) = rows.passes({"token_ids": np.array([5, 6, 0, 8])})
    assert prefill["token_ids"].tolist() == [5, 6, 8]
    assert prefill["request"].tolist() == [4, 4, 5]
    assert prefill["position"].tolist() == [0, 1, 0]
    assert prefill["step"].tolist() == [7, 7, 7]
    decode = list(rows.passes({"token_ids": np.array([3, 9, 4, 4, 9, 9, 5, 5])}))
    assert [one["token_ids"].tolist() for one in decode] == [[3], [4]]
    assert [one["position"].tolist() for one in decode] == [[2], [3]]
    assert [one["step"].tolist() for one in decode] == [[8], [9]]
    assert (rows.active.any(), rows.steps) == (False, 10)


def test_sampling_draws_from_the_share_that_is_asked_for(model, prompts):
    """Among the likeliest token only, and among a share so small that it holds one token, sampling is greedy."""

    def decoded(**options):
        passes = forward_passes(model, [prompts[0].token_ids], RecordOptions(new_tokens=8, **options), batch=0)
        return torch.cat(list(passes)[1:]).flatten().tolist()

    greedy = decoded()
    assert decoded(temperature=1.0, sample_top_k=1) == greedy
    assert decoded(temperature=1.0, sample_top_p=1e-6) == greedy
    free = decoded(temperature=5.0)
    assert free == decoded(temperature=5.0)
    assert free != greedy
    assert free != decoded(temperature=5.0, seed=1)


def test_ranks_beyond_the_routers_choice():
    """The router's own choice comes first whatever its scores tie with; an excluded group comes last, with probability 0."""
    infinity = float("inf")
    scores = torch.tensor([[0.5, 0.5, 0.2, -infinity, -0.1]])
    ranked, probability = rank(scores, torch.tensor([[1]]), 5, are_logits=False)
    assert ranked.tolist() == [[1, 0, 2, 4, 3]]
    np.testing.assert_allclose(probability, [[0.5 / 1.2, 0.5 / 1.2, 0.2 / 1.2, 0, 0]], rtol=1e-6)
    logits = torch.tensor([[1.0, 3.0, -2.0]])
    ranked, probability = rank(logits, None, 2, are_logits=True)
    assert ranked.tolist() == [[1, 0]]
    np.testing.assert_allclose(probability, logits.softmax(-1)[:, [1, 0]], rtol=1e-6)


def test_a_router_that_returns_probabilities_has_their_logarithms_recorded(prompts, out):
    """Their softmax is what the router returned."""
    model = tiny_model("olmoe")
    given = []
    for layer in moe_layers(model, "tiny"):
        router = layer.block.gate
        original = router.forward

        def forward(hidden, original=original):
            logits, weights, ids = original(hidden)
            return logits.softmax(-1), weights, ids

        router.forward = forward
        router.register_forward_hook(lambda _, args, output: given.append(output[0]))
    trace = record(model, prompts[:1], out, RecordOptions(new_tokens=1, router_logits="float32"))
    logits = torch.tensor(np.asarray(trace.router_logits[:5, 0]))
    torch.testing.assert_close(logits.softmax(-1), given[4], rtol=1e-4, atol=1e-6)  # the first layer after the probe


def test_an_id_after_the_last_is_no_expert(prompts, out):
    """transformers' own mark for a token that skips: recorded as -1 with weight 0, after the experts."""
    model = tiny_model("olmoe")
    router = model.model.layers[1].mlp.gate
    original = router.forward

    def forward(hidden):
        logits, weights, ids = original(hidden)
        skipped = torch.zeros_like(ids, dtype=torch.bool)
        skipped[::2, 0] = True
        return logits, weights.masked_fill(skipped, 0), ids.masked_fill(skipped, EXPERTS)

    router.forward = forward
    trace = record(model, prompts[:1], out, RecordOptions(new_tokens=1, stop_at_end=False))
    prefill = trace.phase == PREFILL
    assert (trace.experts[prefill, 1, 1] == -1).tolist() == [True, False, True, False, True]
    assert (trace.experts[prefill, 1, 0] >= 0).all()
    assert (trace.experts[prefill, 0] >= 0).all()


def test_a_model_whose_weights_are_kept_off_the_device_is_recorded_the_same(model, saved, prompts, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="only with accelerate can weights be kept off the device")
    options = RecordOptions(batch_size=2, new_tokens=3, lookahead=2, router_logits="float32", expert_output_norm=True)
    resident = arrays_of(record(model, prompts, tmp_path / "a.safetensors", options))
    away = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in away.parameters())
    assert_same_arrays(resident, arrays_of(record(away, prompts, tmp_path / "b.safetensors", options)))


def test_the_device_map_of_transformers_places_a_loaded_model(saved, prompts, tmp_path):
    pytest.importorskip("accelerate", reason="transformers needs accelerate for a device_map")
    options = {"batch_size": 2, "new_tokens": 3}
    plain = arrays_of(record(saved, prompts, tmp_path / "a.safetensors", RecordOptions(device="cpu", **options)))
    placed = record(saved, prompts, tmp_path / "b.safetensors", RecordOptions(device_map="cpu", **options))
    assert_same_arrays(plain, arrays_of(placed))


def test_half_precision_is_recorded_as_the_experts_were_given_it(saved, prompts, out):
    trace = record(saved, prompts, out, RecordOptions(new_tokens=2, dtype="bfloat16", residual_cosine=True, lookahead=1))
    assert trace.model.expert_bytes == {"bf16": 3 * 32 * 48 * 2}
    as_bf16 = torch.tensor(np.asarray(trace.weights)).bfloat16().float()
    np.testing.assert_array_equal(as_bf16, trace.weights)


def test_texts_are_tokenized_as_the_models_tokenizer_does(saved, tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "model", "routes"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "with_tokenizer"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("the model routes\nroutes what\n")
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "record", f"model={folder}", "prompts=prompts.txt", "new_tokens=2", "stop_at_end=false"]) == 0
    trace = load_trace("with_tokenizer.safetensors", verify=True)
    assert [trace.token_ids[trace.request == r][:n].tolist() for r, n in ((0, 3), (1, 2))] == [[3, 4, 5], [5, 0]]
    assert capsys.readouterr().out == (
        "with_tokenizer.safetensors: 9 tokens of 2 requests in 6 forward passes, 4 layers x 8 experts, top-2,"
        " from with_tokenizer\n"
    )


def test_every_hook_is_removed_again(model, prompts, out):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    record(model, prompts, out, RecordOptions(new_tokens=1, lookahead=1, residual_cosine=True))
    assert hooks() == before


# ---- kills ---------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for a kill that nothing can catch."""


OPTIONS = RecordOptions(batch_size=2, new_tokens=5, temperature=1.5, lookahead=1)


def abandon(growing, *_):
    """Leave the files as a kill leaves them: what was not yet handed to the system is lost."""
    for file in growing._files.values():
        file.raw.close()


KILLS = {
    "while rows are appended": (columns.GrowingColumns, "append"),
    "when a batch is to count": (columns.GrowingColumns, "commit"),
    "when the record is replaced": (os, "replace"),
    "while the trace is written": (recording, "save_trace"),
    "when the folder is removed": (recording.shutil, "rmtree"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("what", KILLS)
def test_killed_at_any_moment_the_same_call_gives_the_same_bytes(model, prompts, tmp_path, monkeypatch, what, before):
    whole, out = tmp_path / "whole" / "t.safetensors", tmp_path / "killed" / "t.safetensors"
    for path in (whole, out):
        path.parent.mkdir()
    record(model, prompts, whole, OPTIONS)
    owner, name = KILLS[what]
    original = getattr(owner, name)

    def killing_at(number):
        """Return `original` with a kill before or after its call of this number."""
        calls = itertools.count(1)

        def killing(*arguments, **keywords):
            now = next(calls) == number
            if now and before:
                raise KilledError
            result = original(*arguments, **keywords)
            if now:
                raise KilledError
            return result

        return killing

    kills = 0
    for number in range(1, 30):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killing_at(number))
            # A kill leaves no time to tidy up.
            patched.setattr(columns.GrowingColumns, "__exit__", abandon)
            try:
                record(model, prompts, out, OPTIONS)
            except KilledError:
                kills += 1
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            break
    record(model, prompts, out, OPTIONS)
    assert kills >= 1
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["t.safetensors"]


KILLED_COMMAND = """
import os, signal, sys
from traces.recorder.columns import GrowingColumns

original = GrowingColumns.append

def append(self, rows):
    original(self, rows)
    if self.batches == 1 and self.rows > 20:
        os.kill(os.getpid(), signal.SIGKILL)

GrowingColumns.append = append
from sim.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_command_that_is_killed_goes_on_to_the_same_bytes(saved, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["trace", "record", f"model={saved}", f"prompts={prompt_file}", "batch_size=2", "new_tokens=5", "lookahead=1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_COMMAND, *words, "out=trace.safetensors"],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not Path("trace.safetensors").exists()
    assert columns.read_record(Path("trace.safetensors.recording"))["batches"] == 1
    assert main([*words, "out=trace.safetensors"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"trace.safetensors: \d+ tokens of 5 requests in 18 forward passes, 4 layers x .*\n", said.out)
    assert re.fullmatch(r"3 of 3 batches done, \d+ tokens, \d+ tokens/s", said.err.splitlines()[-1])
    assert main([*words, "out=whole.safetensors"]) == 0
    assert Path("whole.safetensors").read_bytes() == Path("trace.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "trace.safetensors", "whole.safetensors"]


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(model, prompts, out, **options):
    """Return the sentence of a refused recording, which leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        record(model, prompts, out, RecordOptions(**{"new_tokens": 2, **options}), name="tiny")
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


@contextmanager
def largest_file(size):
    """The limit on a file's size stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (100, "nothing is kept"),
        (1500, "nothing is kept"),
        (6000, "2 finished batches are kept"),
        (10_000, "3 finished batches are kept"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_claims_to_be_a_trace(
    saved, prompt_file, tmp_path, monkeypatch, capsys, size, kept
):
    """It is met at the very start, in the first batch, in a later one, and by the finished trace; with room, all goes on."""
    monkeypatch.chdir(tmp_path)
    words = ["trace", "record", f"model={saved}", f"prompts={prompt_file}", "out=trace.safetensors"]
    words += ["batch_size=2", "new_tokens=5", "stop_at_end=false", "router_logits=float32"]
    with largest_file(size):
        code = main(words)
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.splitlines()[-1] == (
        f"foregate: trace.safetensors.recording: File too large; {kept}, and the same command goes on when this is mended"
    )
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert Path("trace.safetensors.recording").exists() == (kept != "nothing is kept")
    assert main(words) == 0
    assert load_trace("trace.safetensors", verify=True).tokens == sum(LENGTHS) + 5 * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "trace.safetensors"]


def test_a_model_without_moe_layers_is_refused(prompts, out):
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    assert refusal(dense, prompts, out) == "tiny: LlamaForCausalLM has no MoE layers; there is no routing to record"


OUT_OF_SIGHT = {
    "JetMoe": ({"kv_channels": 8}, "model.layers.0.mlp (JetMoeMoE)"),
    "Llama4": ({"head_dim": 8, "intermediate_size_mlp": 48}, "model.layers.0.feed_forward.experts (Llama4TextExperts)"),
}


@pytest.mark.parametrize("architecture", OUT_OF_SIGHT)
def test_a_model_whose_experts_are_out_of_sight_is_refused(prompts, out, architecture):
    needed, module = OUT_OF_SIGHT[architecture]
    names = {"JetMoe": "JetMoeConfig", "Llama4": "Llama4TextConfig"}
    config = getattr(transformers, names[architecture])(**{**COMMON, **needed, "num_hidden_layers": 2})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    assert refusal(model, prompts, out) == (
        f"tiny: {architecture}ForCausalLM cannot be recorded: {module} does not go through transformers' experts interface,"
        " where routed experts and weights are observed"
    )


def test_layers_of_different_size_are_refused(prompts, out):
    model = tiny_model("olmoe")
    model.model.layers[2].mlp = tiny_model("olmoe", num_experts=4).model.layers[0].mlp
    assert refusal(model, prompts, out) == (
        "tiny: model.layers.2.mlp.experts has 4 experts and model.layers.0.mlp.experts has 8;"
        " a trace needs the same number in every layer"
    )


def test_experts_that_are_not_called_are_refused(prompts, out):
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    assert refusal(model, prompts, out) == (
        "tiny: model.layers.1.mlp.experts was not called in one pass; each layer's experts must be called once"
    )


def test_experts_that_are_called_twice_are_refused(prompts, out):
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp
    once = block.forward
    block.forward = lambda hidden: once(once(hidden))
    assert refusal(model, prompts, out).startswith("tiny: model.layers.1.mlp.experts was called 2 times in one pass; ")


def test_ids_that_are_no_experts_are_refused(prompts, out):
    model = tiny_model("olmoe")
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: (args[0], args[1] + EXPERTS + 1, args[2]))
    assert refusal(model, prompts, out).startswith("tiny: model.layers.1.mlp.experts was given the expert ")


def test_a_routing_that_no_score_explains_has_no_lookahead(prompts, out):
    model = tiny_model("olmoe")
    router = model.model.layers[1].mlp.gate
    original = router.forward

    def by_position(hidden):
        logits, weights, ids = original(hidden)
        return logits, weights, (torch.arange(len(ids))[:, None] + torch.arange(ids.shape[1])) % EXPERTS

    router.forward = by_position
    assert refusal(model, prompts, out, lookahead=1) == (
        "tiny: the routing of model.layers.1.mlp.experts is not the top 2 of any score of its router (OlmoeTopKRouter), so"
        " lookahead has no meaning; record with lookahead=0"
    )
    assert record(model, prompts, out, RecordOptions(new_tokens=2, router_logits="float32")).router_logits is not None


def test_a_router_that_is_not_beside_its_experts_has_no_logits(prompts, out):
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp
    hidden_away = [block.gate]
    del block.gate
    block.gate = lambda hidden: hidden_away[0](hidden)
    assert refusal(model, prompts, out, router_logits="float32") == (
        "tiny: no module beside model.layers.1.mlp.experts could be the router of its 8 experts; record without"
        " router_logits and lookahead"
    )


def test_weights_that_are_no_numbers_are_refused(prompts, out):
    model = tiny_model("olmoe")
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], args[2] * float("nan")))
    assert refusal(model, prompts, out).startswith("tiny, batch 0: weights[token 0, layer 1, rank 0] is nan; ")


REFUSED_OPTIONS = {
    "batch_size": (0, "batch_size is 0; it must be a whole number of at least 1"),
    "new_tokens": (1.5, "new_tokens is 1.5; it must be a whole number of at least 1"),
    "temperature": (-1, "temperature is -1; it must be a number of at least 0"),
    "sample_top_p": (0, "sample_top_p is 0; it must be a number above 0 and at most 1"),
    "seed": (-1, "seed is -1; it must be a whole number of at least 0"),
    "stop_at_end": (1, "stop_at_end is 1; it must be true or false"),
    "router_logits": ("bfloat16", "router_logits is 'bfloat16'; it must be float16 or float32, or null for none"),
    "max_prompt_tokens": (0, "max_prompt_tokens is 0; it must be a whole number of at least 1"),
    "lookahead": (4, "lookahead is 4; tiny has 4 MoE layers, so it must be at most 3"),
    "device_map": (3, "device_map is 3; it must be a text or null"),
}


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_an_option_that_cannot_be_is_refused(model, prompts, out, option):
    value, sentence = REFUSED_OPTIONS[option]
    assert refusal(model, prompts, out, **{option: value}).startswith(sentence)


def test_ranks_must_reach_twice_k(model, prompts, out):
    assert refusal(model, prompts, out, lookahead=1, lookahead_ranks=3) == (
        "lookahead_ranks is 3; it must be 4 (twice the k of tiny) to 8, all its experts"
    )


def test_prompts_must_fit_the_model(model, out):
    unknown = [Prompt("p.jsonl, line 7", None, (3, 96))]
    assert refusal(model, unknown, out) == "p.jsonl, line 7: the token 96 is unknown to tiny; its tokens are 0 to 95"
    long = [Prompt("p.jsonl, line 7", None, (3,) * 127)]
    assert refusal(model, long, out) == (
        "p.jsonl, line 7: 127 tokens and new_tokens=2 are more than the 128 positions of tiny;"
        " cut prompts with max_prompt_tokens=126, or lower new_tokens"
    )
    assert refusal(model, long, out, new_tokens=128).endswith("more than the 128 positions of tiny; lower new_tokens")
    assert record(model, long, out, RecordOptions(new_tokens=2, stop_at_end=False, max_prompt_tokens=126)).tokens == 128


def test_a_tokenizer_that_cannot_be_loaded_is_said(saved, out, tmp_path):
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    (damaged / "tokenizer_config.json").write_text("{")
    said = refusal(damaged, [Prompt("p.txt, line 1", "words", None)], out)
    assert said.startswith(f"model: the tokenizer of {damaged} cannot be loaded (")


def test_a_text_needs_a_tokenizer(saved, out):
    assert refusal(saved, [Prompt("p.txt, line 1", "words", None)], out) == (
        "p.txt, line 1: prompt is a text, but the model has no tokenizer; give token_ids instead"
    )


def test_other_settings_do_not_go_on_with_a_recording(model, prompts, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(recording, "save_trace", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            record(model, prompts, out, OPTIONS, name="tiny")
    sentence = f"{out}.recording: this recording was begun with other settings: "
    assert refusal(model, prompts, out, batch_size=2, new_tokens=5, temperature=1.5, lookahead=2).startswith(
        f"{sentence}lookahead was 1 and is now 2; finish it with those, or remove it"
    )
    assert refusal(model, prompts[:4], out, batch_size=2, new_tokens=5, temperature=1.5, lookahead=1).startswith(
        f"{sentence}prompts_sha256 was "
    )
    other = tiny_model("olmoe", norm_topk_prob=True)
    assert refusal(other, prompts, out, batch_size=2, new_tokens=5, temperature=1.5, lookahead=1).startswith(
        f"{sentence}config_sha256 was "
    )


def test_a_trace_that_is_there_is_kept(model, prompts, out):
    first = record(model, prompts, out, RecordOptions(new_tokens=2), name="tiny")
    content = out.read_bytes()
    assert record(model, prompts, out, RecordOptions(new_tokens=2), name="tiny").hash == first.hash
    assert refusal(model, prompts, out, new_tokens=3) == (
        f"{out}: this trace is there already, recorded with other settings: new_tokens was 2 and is now 3;"
        " remove it, or choose another out"
    )
    assert out.read_bytes() == content


def test_a_folder_of_something_else_is_not_touched(model, prompts, out):
    folder = out.with_name(f"{out.name}.recording")
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert refusal(model, prompts, out) == (
        f"{folder}: this is no recording in progress (there is no sound recorded.json); remove it or move it away"
    )


WRONG_COMMANDS = {
    "no model": (["prompts=p.txt"], "model has no value; give one: model=FOLDER_OR_ID"),
    "no prompts": (["model=there"], "prompts has no value; give one: prompts=..."),
    "no such prompts": (
        ["model=there", "prompts=no.txt"],
        "no.txt: there is no such file; prompts must be a text file or a ",
    ),
    "an empty file": (["model=there", "prompts=empty.txt"], "empty.txt: there is no prompt; write one per line"),
    "a folder of prompts": (["model=there", "prompts=there"], "there: this is a folder; prompts must be a text file or a "),
    "no such model": (["model=./no", "prompts=p.txt"], "model: there is no folder ./no; it must be a folder with a saved"),
    "a folder that is no model": (
        ["model=there", "prompts=p.txt"],
        "model: there is no saved model; it must be a folder with",
    ),
    "unknown option": (
        ["model=there", "prompts=p.txt", "new_token=3"],
        "'new_token' is not a setting: did you mean 'new_tokens'",
    ),
    "wrong option": (
        ["model=there", "prompts=p.txt", "batch_size=a"],
        "batch_size is 'a'; it must be a whole number of at least",
    ),
    "wrong name": (
        ["model=there", "prompts=p.txt", "out=a.npz"],
        "a.npz: a trace file's name must end in .safetensors, not in",
    ),
    "no folder": (
        ["model=there", "prompts=p.txt", "out=no/a.safetensors"],
        "no/a.safetensors: the folder no does not exist; it",
    ),
    "wrong type": (
        ["model=begun", "prompts=p.txt", "dtype=float3"],
        "dtype is 'float3'; it must be auto or a type of torch's",
    ),
    "wrong device": (
        ["model=begun", "prompts=p.txt", "device=gpu"],
        "device is 'gpu'; it must be auto, cpu, cuda or cuda:NUM",
    ),
}


@pytest.mark.parametrize("what", WRONG_COMMANDS)
def test_a_wrong_command_is_one_sentence(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "p.txt").write_text("a prompt\n")
    (tmp_path / "empty.txt").write_text("\n")
    words, sentence = WRONG_COMMANDS[what]
    assert main(["trace", "record", *words]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith(f"foregate: {sentence}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "empty.txt", "p.txt", "there"]


def test_an_interrupt_keeps_the_finished_batches(saved, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = columns.GrowingColumns.append

    def append(self, rows):
        if self.batches == 2:
            raise KeyboardInterrupt
        original(self, rows)

    monkeypatch.setattr(columns.GrowingColumns, "append", append)
    assert main(["trace", "record", f"model={saved}", f"prompts={prompt_file}", "new_tokens=3"]) == 130
    sentence = "foregate: interrupted; finished results are kept, the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert columns.read_record(tmp_path / "tiny_olmoe.safetensors.recording")["batches"] == 2


# ---- where it runs ---------------------------------------------------------------------------------------------------


def test_the_recorder_needs_nothing_of_the_command_line():
    """It is used as a function where neither Hydra nor SimPy is installed."""
    code = """
import sys
for name in ("hydra", "omegaconf", "simpy", "numba", "pandas", "pyarrow"):
    sys.modules[name] = None  # an import of these would fail
from traces.recorder import record
import traces.recorder.recording
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
