"""llama.cpp's CSV and JSON lines: passes, the last layer's missing tokens, faulty recorders, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace

PROMPT = {1: [[0, 1], [2, 3], [4, 5]], 2: [[5, 4], [3, 2], [1, 0]], 3: [[2, 0]]}
"""One pass of three tokens; the last layer is computed for the last of them only."""

TOKEN = {1: [[0, 2]], 2: [[3, 1]], 3: [[4, 5]]}

ROUTED = [
    [[0, 1], [5, 4], [-1, -1]],
    [[2, 3], [3, 2], [-1, -1]],
    [[4, 5], [1, 0], [2, 0]],
    [[0, 2], [3, 1], [4, 5]],
    [[0, 2], [3, 1], [4, 5]],
]
"""What a prompt and two tokens make."""


def csv(*passes, header=True):
    rows = [(layer, expert) for one in passes for layer, tokens in one.items() for token in tokens for expert in token]
    return ("layer,expert\n" if header else "") + "".join(f"{layer},{expert}\n" for layer, expert in rows)


def jsonl(*calls):
    """Return the lines of `calls`, each a list of passes."""
    lines = [
        {"decode": decode, "layer": layer, "n_tokens": len(tokens), "n_used": len(tokens[0]), "experts": tokens}
        for decode, passes in enumerate(calls)
        for one in passes
        for layer, tokens in one.items()
    ]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


WRITTEN = {
    "llama_cpp_csv": (csv(PROMPT, TOKEN, TOKEN), {"experts": 6, "top_k": 2}),
    "llama_cpp_jsonl": (jsonl([PROMPT], [TOKEN], [TOKEN]), {"experts": 6}),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "moe_trace"


def read(path, format, text, **options):  # noqa: A002
    path.write_text(text)
    return import_trace(path, format, **{**WRITTEN[format][1], **options})


@pytest.mark.parametrize("format", WRITTEN)
def test_passes_become_steps_and_the_last_layer_is_skipped_where_it_was(path, format):  # noqa: A002
    trace = read(path, format, WRITTEN[format][0])
    assert trace.experts.tolist() == ROUTED
    assert trace.step.tolist() == [0, 0, 0, 1, 2]
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.position.tolist() == [0, 1, 2, 3, 4]
    assert set(trace.request) == {0}
    assert (trace.model.layers, trace.model.experts, trace.model.top_k) == (3, 6, 2)


@pytest.mark.parametrize("format", WRITTEN)
def test_what_llama_cpp_does_not_say_stays_unknown(path, format):  # noqa: A002
    trace = read(path, format, WRITTEN[format][0])
    assert (trace.weights, trace.ranked, trace.capabilities()) == (None, False, frozenset())
    assert trace.provenance.details["given_by_the_user"] == WRITTEN[format][1]
    assert {"gate weights", "order of a token's experts", "name of the model"} < set(trace.provenance.details["unknown"])
    assert trace.model.name == "moe_trace"
    assert read(path, format, WRITTEN[format][0], model_name="tiny").model.name == "tiny"


def test_the_header_line_may_be_absent(path):
    assert read(path, "llama_cpp_csv", csv(PROMPT, TOKEN, TOKEN, header=False)).experts.tolist() == ROUTED


def test_a_prompt_of_two_passes_asks_for_no_output_in_the_first(path):
    first = {layer: tokens for layer, tokens in PROMPT.items() if layer < 3}
    for format, text in (("llama_cpp_csv", csv(first, PROMPT)), ("llama_cpp_jsonl", jsonl([first, PROMPT]))):  # noqa: A001
        trace = read(path, format, text)
        assert trace.step.tolist() == [0, 0, 0, 1, 1, 1]
        assert trace.experts[:3, 2].tolist() == [[-1, -1]] * 3
        assert set(trace.phase) == {PREFILL}


@given(st.integers(1, 5), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_routing_survives(tmp_path_factory, prompt, answer, random):
    """A prompt and some tokens of two layers, top-3 of seven experts, through both formats."""
    path = tmp_path_factory.mktemp("llama") / "trace"
    lengths = [prompt] + [1] * answer
    passes = [{layer: [random.sample(range(7), 3) for _ in range(n)] for layer in (0, 4)} for n in lengths]
    routed = [list(token) for one in passes for token in zip(*one.values(), strict=True)]
    assert read(path, "llama_cpp_csv", csv(*passes), experts=7, top_k=3).experts.tolist() == routed
    assert read(path, "llama_cpp_jsonl", jsonl(*([one] for one in passes)), experts=7).experts.tolist() == routed


@pytest.mark.parametrize("format", WRITTEN)
def test_a_recorder_that_read_the_view_as_dense_is_recognised(path, format):  # noqa: A002
    """Of 16 experts sorted for each of 8 tokens, the first 16 ids of a dense read are one token's permutation."""
    order = np.random.default_rng(0)
    misread = {layer: [order.permutation(16).tolist() for _ in range(8)] for layer in (0, 1)}
    misread = {layer: np.ravel(rows)[:16].reshape(8, 2).tolist() for layer, rows in misread.items()}
    text = csv(misread) if format == "llama_cpp_csv" else jsonl([misread])
    path.write_text(text)
    options = {**WRITTEN[format][1], "experts": 16}
    assert "the first 16 ids are all 16 experts; the recorder read the top-k view" in refusal(path, format, **options)
    misread[1][0] = misread[1][1]
    assert read(path, format, csv(misread) if format == "llama_cpp_csv" else jsonl([misread]), experts=16).tokens == 8


def changed(**changes):
    """Return one JSON line of a pass of one token with some fields replaced."""
    line = {"decode": 0, "layer": 0, "n_tokens": 1, "n_used": 2, "experts": [[0, 1]], **changes}
    return json.dumps({name: value for name, value in line.items() if value is not ...}) + "\n"


BAD_CSV = {
    "no experts": (csv(TOKEN), {"experts": None}, "does not say how many experts a layer has; give it as options.experts"),
    "no k": (csv(TOKEN), {"top_k": None}, "does not say how many experts a token uses; give it as options.top_k=NUMBER"),
    "large k": (csv(TOKEN), {"top_k": 7}, "options.top_k is 7; it must be at most 6"),
    "wrong k": (csv(PROMPT), {"top_k": 4}, "the 6 rows of layer 1 from line 2 are no multiple of top_k 4; the file may be"),
    "cut off": (csv(TOKEN)[:-4], {}, "the 1 rows of layer 3 from line 6 are no multiple of top_k 2"),
    "too few experts": (csv(TOKEN), {"experts": 5}, "the pass from line 2: layer 3 holds 5; an expert is 0 to 4"),
    "one column": ("layer,expert\n1\n", {}, "line 2 is '1'; it must be layer,expert"),
    "other header": ("phase,token,layer,rank,expert\n", {}, "line 1: layer is 'phase'; it must be a whole number"),
    "odd expert": ("1,x\n", {}, "line 1: expert is 'x'; it must be a whole number, 0 to 2147483647"),
    "negative expert": ("1,-1\n", {}, "line 1: expert is '-1'; it must be a whole number"),
    "huge expert": ("1,99999999999\n", {}, "line 1: expert is '99999999999'; it must be a whole number"),
    "far layer": ("32768,1\n", {}, "line 1: layer is '32768'; it must be a whole number, 0 to 32767"),
    "one layer": (csv({0: [[0, 1]]}), {}, "all rows are of one layer, so that no pass's end shows"),
    "header only": ("layer,expert\n", {}, "no pass is there; a recording holds at least one"),
    "short middle": (csv({**PROMPT, 2: [[0, 1]]}), {}, "layer 2 lists 1 tokens, the first listed 3; all must agree"),
    "long last": (csv({**PROMPT, 3: [[0, 1], [2, 3]]}), {}, "layer 3 lists 2 tokens, the first listed 3; all must agree"),
    "missing first": (csv(TOKEN, {2: [[0, 1]], 3: [[0, 1]]}), {}, "the pass from line 8: layer 1 lists 0 tokens"),
    "same expert": (csv({1: [[0, 0]], 2: [[0, 1]]}), {}, "the same expert is already there"),
    "prompt after decode": (csv(TOKEN, PROMPT), {}, "phase of request 0 goes from decode back to prefill"),
    "no text": ("\udcff", {}, "byte 0 is no UTF-8 text"),
    "empty": ("", {}, "the file is empty"),
}

BAD_JSONL = {
    "no experts": (changed(), {"experts": None}, "does not say how many experts a layer has; give it as options.experts"),
    "too few experts": (changed(), {"experts": 1}, "the pass from line 1: layer 0 holds 1; an expert is 0 to 0"),
    "cut off": (changed()[:-3], {}, "line 1 is not valid JSON"),
    "no object": ("[]\n", {}, "line 1 is '[]'; it must be an object with decode, layer, n_tokens, n_used, experts"),
    "missing field": (changed(n_used=...), {}, "it must be an object with decode, layer, n_tokens, n_used, experts"),
    "odd layer": (changed(layer="0"), {}, "line 1: layer is '0'; it must be a whole number of at least 0"),
    "far layer": (changed(layer=32768), {}, "line 1: layer is 32768; it must be at most 32767"),
    "no tokens": (changed(n_tokens=0, experts=[]), {}, "line 1: n_tokens is 0; it must be a whole number of at least 1"),
    "other count": (changed(n_tokens=2), {}, "line 1: experts is int64 of shape [1, 2]; it must be whole numbers, [2, 2]"),
    "ragged": (changed(n_tokens=2, experts=[[0, 1], [2]]), {}, "line 1: experts is no array"),
    "floats": (changed(experts=[[0.5, 1]]), {}, "line 1: experts is float64 of shape [1, 2]"),
    "negative": (changed(experts=[[0, -1]]), {}, "line 1: experts holds -1; an expert is a number from 0"),
    "other k": (changed() + changed(layer=1, n_used=1, experts=[[0]]), {}, "line 2: n_used is 1, before it was 2"),
    "falling call": (changed(decode=1) + changed(), {}, "line 2: decode falls from 1 to 0; calls must be in order"),
    "long call": (
        changed(decode=1, n_tokens=2, experts=[[0, 1]] * 2),
        {},
        "decode 1 has 2 tokens; only decode 0 is",
    ),
    "missing layer": (
        changed() + changed(layer=1) + changed(decode=1, layer=1),
        {},
        "line 3: layer 0 lists 0 tokens",
    ),
    "same expert": (changed(experts=[[1, 1]]), {}, "the same expert is already there"),
}


@pytest.mark.parametrize(
    ("format", "text", "options", "words"),
    [("llama_cpp_csv", *case) for case in BAD_CSV.values()] + [("llama_cpp_jsonl", *case) for case in BAD_JSONL.values()],
    ids=[f"csv: {name}" for name in BAD_CSV] + [f"jsonl: {name}" for name in BAD_JSONL],
)
def test_a_wrong_file_is_refused(path, format, text, options, words):  # noqa: A002
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert words in refusal(path, format, **{**WRITTEN[format][1], **options})


@pytest.mark.parametrize("format", WRITTEN)
def test_the_command_says_it_in_a_sentence(path, format, capsys):  # noqa: A002
    path.write_text(WRITTEN[format][0])
    assert_command_refuses(path, format, capsys)
    assert_command_refuses(path, format, capsys, **{**WRITTEN[format][1], "experts": 3})
    assert_command_refuses(path.parent, format, capsys, **WRITTEN[format][1])
