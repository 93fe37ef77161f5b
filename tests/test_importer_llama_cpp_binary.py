"""RTRACE01: built byte by byte; ranked by probability, complete or refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace, importers

OPTIONS = {"top_k": 2, "prompt_tokens": 2}

PROBABILITIES = [
    [[0.5, 0.25, 0.125, 0.125], [0.0, 0.125, 0.25, 0.625]],
    [[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]],
    [[0.125, 0.5, 0.25, 0.125], [0.25, 0.0, 0.0, 0.75]],
]
RANKED = [[[0, 1], [3, 2]], [[0, 1], [1, 0]], [[1, 2], [3, 0]]]
"""The two best of each, of equals the lower number first."""


def header(experts=4, version=1, magic=b"RTRACE01"):
    return magic + struct.pack("<ii", experts, version)


def record(token, layer, probabilities):
    return struct.pack(f"<ii{len(probabilities)}f", token, layer, *probabilities)


def records(tokens=PROBABILITIES, layers=(3, 5), skip=()):
    return b"".join(
        record(number, layer, probabilities)
        for number, token in enumerate(tokens)
        for layer, probabilities in zip(layers, token, strict=True)
        if (number, layer) not in skip
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "router.bin"


def read(path, content, **options):
    path.write_bytes(content)
    return import_trace(path, "llama_cpp_binary", **{**OPTIONS, **options})


def test_experts_are_those_of_highest_probability(path):
    trace = read(path, header() + records())
    assert trace.experts.tolist() == RANKED
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.position.tolist() == [0, 1, 2]
    assert (trace.model.layers, trace.model.experts, trace.model.top_k) == (2, 4, 2)


def test_the_order_of_records_does_not_matter_nor_where_tokens_begin(path):
    size = len(record(0, 0, PROBABILITIES[0][0]))
    content = records()
    turned = b"".join(content[at : at + size] for at in range(len(content) - size, -1, -size))
    assert read(path, header() + turned).experts.tolist() == RANKED
    later = b"".join(record(7 + t, l, p) for t, token in enumerate(PROBABILITIES) for l, p in enumerate(token))  # noqa: E741
    assert read(path, header() + later).experts.tolist() == RANKED


def test_files_are_ranked_in_blocks(path, monkeypatch):
    monkeypatch.setattr(importers()["llama_cpp_binary"], "_BLOCK", 1)
    assert read(path, header() + records()).experts.tolist() == RANKED


def test_prompt_tokens_may_skip_the_last_layer(path):
    trace = read(path, header() + records(skip=[(0, 5)]))
    assert trace.experts[0].tolist() == [[0, 1], [-1, -1]]
    assert trace.experts[1:].tolist() == RANKED[1:]


def test_what_the_file_does_not_say_stays_unknown(path):
    trace = read(path, header() + records())
    assert (trace.weights, trace.router_logits, trace.capabilities()) == (None, None, frozenset())
    assert trace.provenance.details["given_by_the_user"] == OPTIONS
    assert "whether the router chose the experts of highest probability" in trace.provenance.details["unknown"]
    assert trace.model.name == "router"
    assert read(path, header() + records(), model_name="tiny").model.name == "tiny"


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=6))
def test_every_ranking_survives(tmp_path_factory, ranking):
    """Probabilities that fall along a permutation give its beginning back."""
    path = tmp_path_factory.mktemp("rtrace") / "router.bin"
    falling = [0.4, 0.3, 0.2, 0.06, 0.03, 0.01]
    tokens = [[[falling[order.index(expert)] for expert in range(6)]] for order in ranking]
    trace = read(path, header(experts=6) + records(tokens, layers=(0,)), top_k=3)
    assert trace.experts[:, 0].tolist() == [order[:3] for order in ranking]


NAN = float("nan")
BAD = {
    "no k": (header() + records(), {"top_k": None}, "does not say how many experts a token uses; give it as options.top_k"),
    "no prompt": (
        header() + records(),
        {"prompt_tokens": None},
        "give it as options.prompt_tokens=NUMBER",
    ),
    "large k": (header() + records(), {"top_k": 5}, "options.top_k is 5; it must be at most 4"),
    "empty": (b"", {}, "the file is empty"),
    "other magic": (
        header(magic=b"RTRACE02") + records(),
        {},
        "it begins with b'RTRACE02'; the format begins",
    ),
    "short header": (header()[:12], {}, "it begins with b'RTRACE01'; the format begins with b'RTRACE01' and two numbers"),
    "other version": (header(version=2) + records(), {}, "version is 2; this program reads version 1"),
    "no experts": (header(experts=0) + records(), {}, "experts is 0; it must be a whole number of at least 1"),
    "huge experts": (header(experts=2**31 - 1) + records(), {}, "experts is 2147483647; it must be at most 32768"),
    "header only": (header(), {}, "0 bytes follow the header; a record of 4 experts has 24"),
    "truncated": ((header() + records())[:-1], {}, "143 bytes follow the header; a record of 4 experts has 24"),
    "negative token": (
        header() + record(-1, 0, [1, 0, 0, 0]),
        {},
        "a record has token -1, layer 0; both",
    ),
    "negative layer": (
        header() + record(0, -1, [1, 0, 0, 0]),
        {},
        "a record has token 0, layer -1; both",
    ),
    "far token": (header() + records() + record(2**31 - 1, 3, [1, 0, 0, 0]), {}, "tokens 0 to 2147483647 have 7 records"),
    "record twice": (header() + records() + records()[:24], {}, "token 0 has 2 records of layer 3; it must have one"),
    "first layer missing": (header() + records(skip=[(1, 3)]), {}, "token 1 has 0 records of layer 3; it must have one"),
    "decode layer missing": (header() + records(skip=[(2, 5)]), {}, "token 2 has 0 records of layer 5; it must have one"),
    "NaN": (header() + record(0, 0, [0, NAN, 0, 1]), {}, "record 0: the probability of expert 1 is nan; it must be between"),
    "above 1": (header() + record(0, 0, [0, 0, 0, 2]), {}, "record 0: the probability of expert 3 is 2.0"),
}


@pytest.mark.parametrize(("content", "options", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_file_is_refused(path, content, options, words):
    path.write_bytes(content)
    assert words in refusal(path, "llama_cpp_binary", **{**OPTIONS, **options})


def test_the_command_says_it_in_a_sentence(path, capsys):
    path.write_bytes(header() + records())
    assert_command_refuses(path, "llama_cpp_binary", capsys, top_k=2)
    path.write_bytes(header() + records()[:-1])
    assert_command_refuses(path, "llama_cpp_binary", capsys, **OPTIONS)
