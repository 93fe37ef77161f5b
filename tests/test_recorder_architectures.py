"""Every verified architecture: what is recorded is what its experts were given, and recording changes nothing."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="recording needs torch")
pytest.importorskip("transformers", reason="recording needs transformers")

import torch
import transformers
from tiny_models import ARCHITECTURES, EXPERTS, TOP_K, VOCABULARY, tiny_model

from traces import DECODE, InputError, RecordOptions, load_trace, record
from traces.recorder import Prompt
from traces.recorder.layers import moe_layers
from traces.recorder.observer import Observer, Wanted
from traces.recorder.probe import probe
from traces.recorder.routers import choose, rank

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (5, 9, 3)
"""Tokens of the prompts: a batch of two with padding, and a batch of one."""
NEW_TOKENS = 6

PROMPTS = [
    Prompt(f"prompt {number}", None, tuple(np.random.default_rng(number).integers(3, VOCABULARY, length).tolist()))
    for number, length in enumerate(LENGTHS)
]

EVERYTHING = {"router_logits": "float32", "lookahead": 1, "expert_output_norm": True}

NO_RESIDUAL = {"flex_olmo": "a norm stands between the block and the residual stream"}


class Calls:
    """What the experts and the routers of a model are called with, kept by hooks that share nothing with the recorder."""

    def __init__(self, model):
        self.experts, self.routers = [], []
        names = [name for name, _ in model.named_modules() if name.endswith(".experts")]
        self.blocks = [model.get_submodule(name.removesuffix(".experts")) for name in names]
        for index, block in enumerate(self.blocks):
            block.experts.register_forward_pre_hook(lambda _, args, index=index: self._on_experts(index, args))
            router = block.gate if hasattr(block, "gate") else block.router
            router.register_forward_pre_hook(lambda module, args, index=index: self._on_router(index, module, args))

    def _on_experts(self, index, args):
        if index == 0:
            self.experts.append([])
        self.experts[-1].append((args[1].clone(), args[2].clone()))

    def _on_router(self, index, module, args):
        if index == 0:
            self.routers.append([])
        self.routers[-1].append((module, args))

    def of_passes(self, calls):
        """Leave out the first pass, which is the probe's."""
        return calls[1:]


class Recorded:
    """A model saved to disk, loaded back and recorded, with the calls of its experts."""

    def __init__(self, architecture, folder):
        self.architecture = architecture
        tiny_model(architecture).save_pretrained(folder / "model")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        self.calls = Calls(self.model)
        options = RecordOptions(batch_size=2, new_tokens=NEW_TOKENS, stop_at_end=False, **EVERYTHING)
        record(self.model, PROMPTS, folder / "trace.safetensors", options)
        self.trace = load_trace(folder / "trace.safetensors", verify=True)

    def rows(self):
        """Yield (pass, rows of it that are no padding, where they are in the trace)."""
        step = 0
        for lengths in (LENGTHS[:2], LENGTHS[2:]):
            width = max(lengths)
            real = [row * width + column for row, n in enumerate(lengths) for column in range(width - n, width)]
            for number in range(1 + NEW_TOKENS):
                yield step, real if number == 0 else range(len(lengths)), np.flatnonzero(self.trace.step == step)
                step += 1


@pytest.fixture(scope="module", params=ARCHITECTURES)
def recorded(request, tmp_path_factory):
    return Recorded(request.param, tmp_path_factory.mktemp(request.param))


def test_ids_and_weights_are_those_that_the_experts_were_given(recorded):
    trace, passes = recorded.trace, recorded.calls.of_passes(recorded.calls.experts)
    assert len(passes) == trace.steps == 2 * (1 + NEW_TOKENS)
    for step, rows, tokens in recorded.rows():
        for layer, (ids, weights) in enumerate(passes[step]):
            ids, weights = ids[list(rows)], weights[list(rows)].float()
            order = weights.argsort(dim=-1, descending=True, stable=True)
            np.testing.assert_array_equal(trace.experts[tokens, layer], ids.gather(1, order))
            np.testing.assert_array_equal(trace.weights[tokens, layer], weights.gather(1, order))
    assert (trace.model.layers, trace.model.experts, trace.model.top_k) == (len(passes[0]), EXPERTS, TOP_K)
    assert len(np.unique(trace.experts)) == EXPERTS


def test_tokens_are_those_that_generate_chooses(recorded):
    trace = recorded.trace
    for request, prompt in enumerate(PROMPTS):
        mine = trace.request == request
        ids = trace.token_ids[mine].tolist()
        assert ids[: len(prompt.token_ids)] == list(prompt.token_ids)
        assert trace.position[mine].tolist() == list(range(len(prompt.token_ids) + NEW_TOKENS))
        assert (trace.phase[mine] == DECODE).sum() == NEW_TOKENS
    width = max(LENGTHS[:2])
    padded = [[0] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in PROMPTS[:2]]
    mask = [[0] * (width - n) + [1] * n for n in LENGTHS[:2]]
    generated = recorded.model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, width:]
    for request in (0, 1):
        decoded = trace.token_ids[(trace.request == request) & (trace.phase == DECODE)]
        assert decoded.tolist() == generated[request].tolist()


def test_lookahead_is_what_the_next_router_makes_of_the_gate_input(recorded):
    trace, passes = recorded.trace, recorded.calls.of_passes(recorded.calls.routers)
    blocks = recorded.calls.blocks
    for step, rows, tokens in recorded.rows():
        for layer in range(trace.model.layers - 1):
            hidden = passes[step][layer][1][0]
            router, args = passes[step][layer + 1]
            with torch.no_grad():
                output = router.forward(hidden, *args[1:])
                if not isinstance(output, tuple):  # this router leaves the choice to its block
                    output = blocks[layer + 1].route_tokens_to_experts(hidden.reshape(-1, hidden.shape[-1]), output)
            (chosen,) = [found for found in output if found.dtype == torch.int64]
            foretold = np.sort(trace.lookahead_experts[tokens, layer, 0, :TOP_K])
            np.testing.assert_array_equal(foretold, np.sort(chosen[list(rows)]))
    assert trace.lookahead_experts.shape[3] == 2 * TOP_K
    assert (trace.lookahead_experts[:, -1] == -1).all()


def test_a_router_asked_about_its_own_layer_gives_the_recorded_routing(recorded):
    layers = moe_layers(recorded.model, "tiny")
    facts = probe(recorded.model, "tiny", layers, PROMPTS[0].token_ids, routers=True, lookahead=True).routers
    seen = {}
    handles = [
        found.module.register_forward_hook(
            lambda _, args, kw, out, index=index: seen.update({index: args}), with_kwargs=True
        )
        for index, found in enumerate(facts)
    ]
    observer = Observer(layers, TOP_K, Wanted())
    with torch.no_grad(), observer:
        recorded.model(input_ids=torch.tensor([PROMPTS[1].token_ids]))
        routed = observer.collect([observer.finish_pass()]).arrays()["experts"]
    for handle in handles:
        handle.remove()
    for index, found in enumerate(facts):
        hidden, *extra = seen[index]
        with torch.no_grad():
            choice = choose(found.module, type("Call", (), {"extra": extra, "keywords": None}), hidden, EXPERTS)
            ranked, probability = rank(choice.scores, choice.ids, EXPERTS, are_logits=found.selects_by_logits)
        np.testing.assert_array_equal(np.sort(ranked[:, :TOP_K]), np.sort(routed[:, index]))
        np.testing.assert_array_equal(np.sort(ranked), np.broadcast_to(np.arange(EXPERTS), ranked.shape))
        np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
        assert (probability.diff(dim=-1) <= 0).all()


def test_logits_are_those_of_the_router(recorded):
    trace, passes = recorded.trace, recorded.calls.of_passes(recorded.calls.routers)
    for step, rows, tokens in recorded.rows():
        for layer, (router, args) in enumerate(passes[step]):
            with torch.no_grad():
                output = router.forward(*args)
            output = output if isinstance(output, tuple) else (output,)
            (logits,) = [found for found in output if found.shape[-1] == EXPERTS]
            np.testing.assert_array_equal(trace.router_logits[tokens, layer], logits.float()[list(rows)])


def test_norms_are_those_of_each_expert_alone(recorded):
    """The weighted outputs of one expert at a time add up to what the experts module returns."""
    block = recorded.calls.blocks[0]
    torch.manual_seed(1)
    hidden = torch.randn(1, recorded.model.config.hidden_size)
    weights = torch.tensor([[0.75, 0.25]])
    observer = Observer(moe_layers(recorded.model, "tiny")[:1], TOP_K, Wanted(expert_output_norm=True))
    with torch.no_grad():
        alone = [block.experts.forward(hidden, torch.tensor([[expert]]), torch.ones(1, 1)) for expert in (3, 5)]
        with observer:
            total = block.experts(hidden, torch.tensor([[3, 5]]), weights)
            norms = observer.collect([observer.finish_pass()]).arrays()["expert_output_norm"]
    torch.testing.assert_close(0.75 * alone[0] + 0.25 * alone[1], total)
    np.testing.assert_allclose(norms[0, 0], [alone[0].norm(), alone[1].norm()], rtol=1e-6)


def test_recording_changes_no_output_bit(recorded):
    layers = moe_layers(recorded.model, "tiny")
    found = probe(recorded.model, "tiny", layers, PROMPTS[0].token_ids, routers=True, lookahead=True)
    ids = torch.tensor([PROMPTS[1].token_ids])
    with torch.no_grad():
        bare = recorded.model(input_ids=ids, use_cache=True)
        with Observer(layers, TOP_K, Wanted("float32", 1, 4, expert_output_norm=True), found.routers) as observer:
            watched = recorded.model(input_ids=ids, use_cache=True)
            observer.finish_pass()
    assert torch.equal(bare.logits, watched.logits)
    for before, after in zip(bare.past_key_values.layers, watched.past_key_values.layers, strict=True):
        if getattr(before, "keys", None) is not None:
            assert torch.equal(before.keys, after.keys)
            assert torch.equal(before.values, after.values)


def test_the_cosine_is_that_of_the_residual_stream(recorded, tmp_path):
    """What the decoder layer returns, where nothing but the routed experts is added: the sum after is the layer's output."""
    options = RecordOptions(new_tokens=1, stop_at_end=False, residual_cosine=True)
    out = tmp_path / "trace.safetensors"
    if recorded.architecture in NO_RESIDUAL:
        with pytest.raises(InputError, match="is not added to a residual stream as it is"):
            record(recorded.model, PROMPTS, out, options)
        assert list(tmp_path.iterdir()) == []
        return
    layers = moe_layers(recorded.model, "tiny")
    after, sums = {}, {}
    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.decoder_layer.register_forward_hook(lambda _, args, output, i=index: after.update({i: output})))
        handles.append(layer.experts.register_forward_hook(lambda _, args, output, i=index: sums.update({i: output})))
        for name, child in layer.block.named_children():  # the shared experts' part would be in the output too
            if "shared" in name:
                child.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    trace = record(recorded.model, PROMPTS[:1], out, options)
    for handle in handles:
        handle.remove()
    scale = getattr(recorded.model.config, "residual_multiplier", 1)
    for index in range(len(layers)):  # of the last pass, the one decode token
        output = after[index][0] if isinstance(after[index], tuple) else after[index]
        output, total = output.reshape(-1), scale * sums[index].reshape(-1)
        expected = torch.nn.functional.cosine_similarity(output - total, output, dim=0)
        assert trace.residual_cosine[-1, index] == pytest.approx(float(expected), abs=1e-5)


def test_sizes_are_counted_from_the_parameters(recorded):
    spec = recorded.trace.model
    parameters = sum(parameter.nbytes for parameter in recorded.model.parameters())
    of_experts = sum(p.nbytes for name, p in recorded.model.named_parameters() if ".experts." in name)
    assert spec.expert_bytes == {"fp32": of_experts // (spec.layers * EXPERTS)}
    assert spec.other_bytes == parameters - of_experts
    assert spec.hidden_size == 32
    assert spec.expert_width == (
        getattr(recorded.model.config, "moe_intermediate_size", None) or recorded.model.config.intermediate_size
    )
