"""SGLang responses: the flat int32 payload, its shape from the user or the schema, and what is refused."""

import base64
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace

TOKENS = [[[0, 1], [5, 4]], [[2, 3], [1, 0]], [[4, 0], [0, 5]], [[1, 0], [2, 3]]]
SHAPE = {"experts": 6, "layers": 2, "top_k": 2}


def payload(tokens):
    """Return the base64 text of the ids as little-endian int32, one after another."""
    ids = [expert for token in tokens for layer in token for expert in layer]
    return base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode()


def response(tokens=TOKENS, prompt=3, **changes):
    """Return what a request of `prompt` prompt tokens gets; its last token has no routing."""
    meta = {"prompt_tokens": prompt, "completion_tokens": len(tokens) + 1 - prompt, "routed_experts": payload(tokens)}
    return {"text": "", "meta_info": {**meta, **changes}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.jsonl"


def read(path, *responses, **options):
    path.write_text("".join(json.dumps(one) + "\n" for one in responses))
    return import_trace(path, "sglang", **{**SHAPE, **options})


def test_prompt_and_answer_are_told_apart_by_the_counts(path):
    trace = read(path, response(), response(TOKENS[:2], prompt=1))
    assert trace.experts.tolist() == TOKENS + TOKENS[:2]
    assert trace.request.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3, 0, 1]
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] + [PREFILL, DECODE]
    assert trace.step.tolist() == [0, 0, 0, 1, 2, 3]


def test_what_sglang_does_not_say_stays_unknown(path):
    trace = read(path, response())
    assert (trace.weights, trace.ranked, trace.capabilities()) == (None, False, frozenset())
    assert trace.provenance.details["given_by_the_user"] == SHAPE
    assert "which prompt tokens came from the prefix cache" in trace.provenance.details["unknown"]
    assert trace.model.name == "responses"
    assert read(path, response(), model_name="tiny").model.name == "tiny"


def test_the_schema_says_the_shape_and_the_moe_layers(path):
    with_dense = [[[0, 0], *token] for token in TOKENS]
    schema = {"num_layers": 3, "top_k": 2, "moe_layer_ids": [1, 2]}
    trace = read(path, response(with_dense, expert_ids_schema=schema), layers=None, top_k=None)
    assert trace.experts.tolist() == TOKENS


def test_dense_layers_are_left_out_by_number(path):
    with_dense = [[[-1, -1], *token] for token in TOKENS]
    assert read(path, response(with_dense), layers=3, moe_layers=[1, 2]).experts.tolist() == TOKENS


@given(st.lists(st.lists(st.permutations(range(6)), min_size=1, max_size=4), min_size=1, max_size=3))
def test_every_routing_survives(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("sglang") / "responses.jsonl"
    rows = [[[token[:3], token[3:]] for token in request] for request in requests]
    trace = read(path, *(response(one, prompt=1) for one in rows), top_k=3)
    assert trace.experts.tolist() == [token for one in rows for token in one]


BAD = {
    "no experts": (response(), {"experts": None}, "does not say how many experts a layer has; give it as options.experts"),
    "no layers": (response(), {"layers": None}, "does not say how many layers it lists; give it as options.layers=NUMBER"),
    "no k": (response(), {"top_k": None}, "does not say how many experts a token uses; give it as options.top_k=NUMBER"),
    "wrong layers": (response(), {"layers": 3}, "has 64 bytes; 4 tokens (all but the last) x 3 layers x top-2 int32 are 96"),
    "cropped": (response(completion_tokens=9), {}, "has 64 bytes; 11 tokens"),
    "too few experts": (response(), {"experts": 5}, "meta_info.routed_experts holds 5; an expert is 0 to 4"),
    "minus one": (response([[[-1, 0], [1, 2]]], prompt=1), {}, "routed_experts holds -1; an expert is a number from 0"),
    "dense": (response([[[0, 0], [1, 2]]], prompt=1), {}, "lists expert 0 only, in every rank of layer 0"),
    "same": (response([[[0, 1], [1, 1]], TOKENS[0]], prompt=1), {}, "the same expert is already there at a better rank"),
    "no meta": ({"text": ""}, {}, "the response: meta_info is None; it must be an object"),
    "no routing": (response(routed_experts=None), {}, "meta_info: routed_experts is None; it must be a text"),
    "no base64": (response(routed_experts="a!"), {}, "meta_info.routed_experts is not valid base64"),
    "odd count": (response(prompt_tokens=True), {}, "meta_info: prompt_tokens is True; it must be a whole number"),
    "odd schema": (response(expert_ids_schema=[]), {}, "meta_info: expert_ids_schema is []; it must be an object"),
    "other schema": (
        response(expert_ids_schema={"num_layers": 3, "top_k": 2}),
        {},
        "options.layers is 2; the response: meta_info.expert_ids_schema.num_layers is 3",
    ),
    "odd number in the schema": (response(expert_ids_schema={"num_layers": 0}), {}, "expert_ids_schema.num_layers is 0; it"),
    "odd layers": (response(), {"moe_layers": 3}, "moe_layers is 3; it must be a list of layer numbers"),
    "odd limit": (response(), {"max_bytes": "2G"}, "options.max_bytes is '2G'; it must be a whole number of at least 1"),
    "no tokens": (response([], prompt=1), {}, "no token's routing is known"),
    "huge layers": (response(), {"layers": 10**9}, "options.layers is 1000000000; it must be at most 32768"),
}


@pytest.mark.parametrize(("found", "options", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_response_is_refused(path, found, options, words):
    path.write_text(json.dumps(found))
    assert words in refusal(path, "sglang", **{**SHAPE, **options})


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_a_truncated_file_is_refused(path, keep):
    path.write_text(json.dumps(response()))
    path.write_bytes(path.read_bytes()[:keep])
    assert "line 1 is not valid JSON" in refusal(path, "sglang", **SHAPE)


def test_the_command_says_it_in_a_sentence(path, capsys):
    path.write_text(json.dumps(response()))
    assert_command_refuses(path, "sglang", capsys, experts=6)
    assert_command_refuses(path, "sglang", capsys, experts=6, layers=2, top_k=3)
