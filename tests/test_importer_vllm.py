"""vLLM responses: both layouts, both encodings, cached prefixes, and one sentence for whatever is wrong."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace, load_trace, save_trace

PROMPT = [[[0, 1], [5, 4]], [[2, 3], [1, 0]], [[4, 0], [0, 5]]]
ANSWER = [[[1, 0], [2, 3]], [[3, 2], [4, 5]]]
CACHED = [[[-1, -1], [-1, -1]]]


def response(prompt=PROMPT, answers=(ANSWER,), **changes):
    choices = [{"index": index, "routed_experts": answer} for index, answer in enumerate(answers)]
    found = {"model": "tiny", "choices": choices, "prompt_routed_experts": prompt, **changes}
    return {name: value for name, value in found.items() if value is not None}


def npy(values, dtype):
    """Return the base64 text of the .npy file that NumPy writes of `values`."""
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.jsonl"


def read(path, *responses, **options):
    path.write_text("".join(json.dumps(one) + "\n" for one in responses))
    return import_trace(path, "vllm", **{"experts": 6, **options})


def test_prompt_and_choices_are_one_request(path):
    trace = read(path, response())
    assert trace.experts.tolist() == PROMPT + ANSWER
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.position.tolist() == [0, 1, 2, 3, 4]
    assert trace.step.tolist() == [0, 0, 0, 1, 2]
    assert (trace.model.name, trace.model.layers, trace.model.experts, trace.model.top_k) == ("tiny", 2, 6, 2)


def test_the_prompt_of_several_choices_belongs_to_the_first(path):
    trace = read(path, response(answers=(ANSWER, ANSWER[:1])), response(prompt=PROMPT[:1]))
    assert trace.request.tolist() == [0] * 5 + [1] + [2] * 3
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 3 + [PREFILL] + [DECODE] * 2


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_a_whole_sequence_is_split_where_the_prompt_ends(path, dtype):
    whole = [{"routed_experts": npy(PROMPT + ANSWER, dtype)}]
    trace = read(path, response(prompt=None, choices=whole, usage={"prompt_tokens": 3, "completion_tokens": 3}))
    assert trace.experts.tolist() == PROMPT + ANSWER
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 2


def test_lists_and_npy_give_the_same(path):
    lists = read(path, response())
    encoded = read(path, response(prompt=npy(PROMPT, "int16"), answers=(npy(ANSWER, "int16"),)))
    np.testing.assert_array_equal(lists.experts, encoded.experts)


def test_tokens_of_a_cached_prefix_are_left_out_and_positions_go_on(path):
    trace = read(path, response(prompt=CACHED * 2 + PROMPT))
    assert trace.experts.tolist() == PROMPT + ANSWER
    assert trace.position.tolist() == [2, 3, 4, 5, 6]
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.provenance.details["cached_tokens_left_out"] == 2


def test_a_prompt_that_was_cached_whole_leaves_the_answer(path):
    trace = read(path, response(prompt=CACHED * 4), response(prompt=CACHED, answers=([],)))
    assert trace.experts.tolist() == ANSWER
    assert trace.position.tolist() == [4, 5]
    assert set(trace.phase) == {DECODE}


def test_one_generated_token_has_no_row(path):
    assert read(path, response(answers=([],))).experts.tolist() == PROMPT


def test_what_vllm_does_not_say_stays_unknown(path, tmp_path):
    trace = read(path, response(model=None))
    assert (trace.weights, trace.ranked, trace.capabilities()) == (None, False, frozenset())
    assert trace.provenance.kind == "imported"
    assert trace.provenance.details["given_by_the_user"] == {"experts": 6}
    assert {"gate weights", "order of a token's experts", "name of the model"} < set(trace.provenance.details["unknown"])
    assert trace.model.name == "responses"
    assert read(path, response(), model_name="other").model.name == "other"
    save_trace(trace, tmp_path / "out.safetensors")
    assert load_trace(tmp_path / "out.safetensors", verify=True).ranked is False


def test_dense_layers_are_left_out_by_number(path):
    with_dense = [[[0, 0], *token] for token in PROMPT]
    answer = [[[0, 0], *token] for token in ANSWER]
    trace = read(path, response(prompt=with_dense, answers=(answer,)), moe_layers=[1, 2])
    assert trace.experts.tolist() == PROMPT + ANSWER
    assert "in every rank of layer 0; if that is no MoE layer, name those that are" in refusal(path, "vllm", experts=6)


@pytest.mark.parametrize("text", [lambda many: json.dumps(many, indent=1), lambda many: json.dumps(many[0])])
def test_a_file_may_be_a_list_or_one_response(path, text):
    path.write_text(text([response()]))
    assert import_trace(path, "vllm", experts=6).tokens == 5


@given(
    st.lists(st.lists(st.permutations(range(6)), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 4),
    st.booleans(),
)
def test_every_routing_survives(tmp_path_factory, requests, prompt, encoded):
    """Tokens whose experts are any three of six, prompt or answer, in either encoding."""
    path = tmp_path_factory.mktemp("vllm") / "responses.jsonl"
    rows = [[[token[:3], token[3:]] for token in request] for request in requests]
    pack = (lambda values: npy(values, "int16")) if encoded else (lambda values: values)
    written = [response(prompt=pack(one[:1]), answers=(pack(one[1:]) if one[1:] else [],)) for one in rows]
    trace = read(path, *written)
    assert trace.experts.tolist() == [token for one in rows for token in one]
    assert trace.request.tolist() == [number for number, one in enumerate(rows) for _ in one]


BAD = {
    "no experts given": ([response()], {"experts": None}, "does not say how many experts a layer has; give it as options"),
    "odd experts": ([response()], {"experts": "6"}, "options.experts is '6'; it must be a whole number of at least 1"),
    "too few experts": (
        [response()],
        {"experts": 5},
        "choices[0].routed_experts holds 5; an expert is 0 to 4",
    ),
    "no object": ([3], {}, "the response is 3; a response is a JSON object"),
    "no choices": ([response(choices=None)], {}, "the response: choices is None; it must be a list"),
    "off": ([response(answers=(None,))], {}, "choices[0].routed_experts is missing; the server must run with"),
    "no usage": ([response(prompt=None)], {}, "the response: usage is None; it must be an object"),
    "odd usage": ([response(prompt=None, usage={"prompt_tokens": -1})], {}, "usage: prompt_tokens is -1; it must be"),
    "cropped": ([response(prompt=None, usage={"prompt_tokens": 9})], {}, "has 2 tokens, fewer than the prompt's 9"),
    "ragged": ([response(prompt=[[[0, 1], [2]]])], {}, "prompt_routed_experts is no array (setting an array element"),
    "flat": ([response(prompt=[[0, 1]])], {}, "prompt_routed_experts is int64 of shape [1, 2]; it must be whole numbers"),
    "floats": ([response(prompt=[[[0.5, 1]]])], {}, "is float64 of shape [1, 1, 2]; it must be whole numbers"),
    "other layers": ([response(prompt=[[[0, 1]]])], {}, "has shape [2, 2, 2], prompt_routed_experts [1, 1, 2]"),
    "other k": (
        [response(), response(prompt=[[[0], [1]]], answers=([[[0], [1]]],))],
        {},
        "line 2: choices[0].routed_experts has 2 layers and top-1; line 1",
    ),
    "same expert": ([response(prompt=[[[1, 1], [2, 3]]])], {}, "experts[token 0, layer 0, rank 1] is 1; the same expert"),
    "half cached": ([response(prompt=[[[-1, -1], [0, 1]]])], {}, "holds -1 at position 0; only a cached prefix has it"),
    "cached later": ([response(prompt=PROMPT + CACHED)], {}, "holds -1 at position 3; only a cached prefix has it"),
    "nothing known": ([response(prompt=CACHED, answers=([],))], {}, "no token's routing is known"),
    "no base64": ([response(prompt="a!")], {}, "prompt_routed_experts is not valid base64"),
    "no npy": ([response(prompt="AAAA")], {}, "prompt_routed_experts has no valid .npy header"),
    "text npy": ([response(prompt=npy(["a"], "U1"))], {}, "prompt_routed_experts is <U1 of shape [1]"),
    "short npy": ([response(prompt=npy(PROMPT, "int16")[:-4])], {}, "claims int16 of shape [3, 2, 2], but holds"),
    "far layer": ([response()], {"moe_layers": [2]}, "moe_layers is 2; it must be at most 1"),
    "turned layers": ([response()], {"moe_layers": [1, 0]}, "moe_layers is [1, 0]; layer numbers must rise"),
    "no layers": ([response()], {"moe_layers": []}, "moe_layers is []; it must be a list of layer numbers"),
}


@pytest.mark.parametrize(("responses", "options", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_response_is_refused(path, responses, options, words):
    path.write_text("".join(json.dumps(one) + "\n" for one in responses))
    assert words in refusal(path, "vllm", **{"experts": 6, **options})


def test_an_npy_that_claims_to_be_huge_is_refused_without_allocating(path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i2", "fortran_order": False, "shape": (10**12, 2, 2)})
    path.write_text(json.dumps(response(prompt=base64.b64encode(file.getvalue()).decode())))
    assert "claims int16 of shape [1000000000000, 2, 2], but holds 0 bytes" in refusal(path, "vllm", experts=6)


@pytest.mark.parametrize("keep", [0, 1, -2, -30])
def test_a_truncated_file_is_refused(path, keep):
    path.write_text(json.dumps(response()) + "\n" + json.dumps(response()))
    path.write_bytes(path.read_bytes()[:keep])
    sentence = refusal(path, "vllm", experts=6)
    assert "the file is empty" in sentence if keep == 0 else "is not valid JSON" in sentence


def test_a_file_above_the_limit_is_refused(path):
    path.write_text(json.dumps(response()))
    assert "more than 10; raise max_bytes" in refusal(path, "vllm", experts=6, max_bytes=10)
    assert "options.max_bytes is '2G'" in refusal(path, "vllm", experts=6, max_bytes="2G")


def test_the_command_says_it_in_a_sentence(path, capsys):
    path.write_text(json.dumps(response()))
    assert_command_refuses(path, "vllm", capsys)
    assert_command_refuses(path, "vllm", capsys, experts=3)
    assert_command_refuses(path.with_name("absent.json"), "vllm", capsys, experts=3)
