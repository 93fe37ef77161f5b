"""Trace files: what is written is read back bit for bit, and nothing inconsistent gets in or out."""

import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from traces import (
    DECODE,
    PREFILL,
    InputError,
    ModelSpec,
    Provenance,
    Trace,
    bundled,
    content_hash,
    load_trace,
    save_trace,
    slice_requests,
    take_tokens,
    validate_trace,
)
from traces.checks import ARRAYS, present_arrays


def small_trace(**changes):
    """Two requests of two prompt tokens and one decode token; 2 layers of 6 experts, top-2; every array."""
    experts = np.array([[[0, 1], [5, 4]], [[2, 3], [1, 0]], [[4, -1], [0, 5]]] * 2, np.int8)
    weights = np.array([[[0.75, 0.25], [0.5, 0.5]]] * 2 + [[[1, 0], [0.75, 0.25]]], np.float16)
    lookahead = np.full((6, 2, 1, 4), -1, np.int8)
    lookahead[:, 0, 0] = [5, 4, 1, 0]
    scores = np.zeros((6, 2, 1, 4), np.float16)
    scores[:, 0, 0] = [0.5, 0.25, 0.125, 0.125]
    fields = {
        "model": ModelSpec("tiny", 2, 6, 2, expert_bytes={"bf16": 24}, other_bytes=100),
        "provenance": Provenance("recorded", "a test", "test", {"seed": 1, "losses": [1.5, None]}),
        "domains": ("prose", ""),
        "experts": experts,
        "weights": np.tile(weights, (2, 1, 1)),
        "request": np.array([0, 0, 0, 1, 1, 1], np.int32),
        "position": np.array([0, 1, 2, 7, 8, 9], np.int32),
        "step": np.array([0, 0, 1, 2, 2, 3], np.int32),
        "phase": np.array([PREFILL, PREFILL, DECODE] * 2, np.uint8),
        "token_ids": np.arange(6, dtype=np.int32),
        "router_logits": np.linspace(-1, 1, 72, dtype=np.float16).reshape(6, 2, 6),
        "lookahead_experts": lookahead,
        "lookahead_scores": scores,
        "expert_output_norm": np.ones((6, 2, 2), np.float16),
        "residual_cosine": np.full((6, 2), 0.5, np.float32),
    }
    return Trace(**{**fields, **changes})


def changed(field, place, value):
    """Return the small trace with one value of one array replaced."""
    array = getattr(small_trace(), field).copy()
    array[place] = value
    return small_trace(**{field: array})


def assert_same(left, right):
    assert (left.model, left.domains) == (right.model, right.domains)
    assert left.provenance == right.provenance
    arrays = present_arrays(left)
    assert list(arrays) == list(present_arrays(right))
    for name, array in arrays.items():
        other = getattr(right, name)
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other, err_msg=name)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.safetensors"


@pytest.fixture
def saved(path):
    save_trace(small_trace(), path)
    return path


# --- round trip ---------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(path):
    digest = save_trace(small_trace(), path)
    loaded = load_trace(path, verify=True)
    assert_same(loaded, small_trace())
    assert loaded.hash == digest == content_hash(small_trace())


def test_unknown_weights_and_order_are_saved_as_unknown(path):
    unknown = small_trace(weights=None, ranked=False)
    save_trace(unknown, path)
    loaded = load_trace(path, verify=True)
    assert loaded.weights is None
    assert loaded.ranked is False
    assert loaded.capabilities() == {"lookahead", "logits"}
    assert len({content_hash(trace) for trace in (unknown, small_trace(), small_trace(ranked=False))}) == 3


def test_weights_of_experts_in_no_order_need_not_fall(path):
    rising = changed("weights", (0, 0), [0.25, 0.75])
    with pytest.raises(InputError, match="descending order"):
        save_trace(rising, path)
    save_trace(replace(rising, ranked=False), path)
    assert load_trace(path).weights[0, 0].tolist() == [0.25, 0.75]


def test_the_same_trace_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_trace(small_trace(), first)
    save_trace(load_trace(first), second)
    assert first.read_bytes() == second.read_bytes()


def test_the_bytes_do_not_depend_on_how_the_arrays_lie_in_memory(path):
    fortran = small_trace(router_logits=np.asfortranarray(small_trace().router_logits))
    assert save_trace(fortran, path) == content_hash(small_trace())
    assert_same(load_trace(path, verify=True), small_trace())


def test_the_file_is_plain_safetensors(saved):
    with safe_open(saved, "np") as file:
        assert set(file.keys()) == set(ARRAYS)
        assert json.loads(file.metadata()["domains"]) == ["prose", ""]
    np.testing.assert_array_equal(load_file(saved)["experts"], small_trace().experts)


def test_loaded_arrays_are_views_that_cannot_be_written(saved):
    loaded = load_trace(saved)
    assert not loaded.experts.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        loaded.experts[0] = 0


def test_arrays_are_aligned_for_their_type(saved):
    assert all(array.flags.aligned for array in present_arrays(load_trace(saved)).values())


def test_optional_arrays_may_be_absent(path):
    optional = [name for name, spec in ARRAYS.items() if not spec.required]
    bare = small_trace(**dict.fromkeys(optional))
    save_trace(bare, path)
    assert_same(load_trace(path), bare)


@st.composite
def traces(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    top_k = draw(st.integers(1, min(experts, 4)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens = sum(lengths)
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    ids = np.argsort(rng.random((tokens, layers, experts)))[..., :top_k]
    weights = -np.sort(-rng.random((tokens, layers, top_k)))
    absent = np.arange(top_k) >= rng.integers(0, top_k + 1, (tokens, layers, 1))
    ids[absent], weights[absent] = -1, 0
    return Trace(
        model=ModelSpec(draw(st.text(min_size=1)), layers, experts, top_k),
        provenance=Provenance("synthetic", draw(st.text()), "hypothesis"),
        domains=tuple(draw(st.lists(st.text(), min_size=len(lengths), max_size=len(lengths)))),
        experts=ids.astype(np.int8 if experts <= 128 else np.int16),
        weights=weights.astype(draw(st.sampled_from([np.float16, np.float32]))),
        request=request,
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        step=np.arange(tokens, dtype=np.int32),
        phase=np.full(tokens, DECODE, np.uint8),
        residual_cosine=draw(st.sampled_from([None, np.zeros((tokens, layers), np.float16)])),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces())
def test_any_trace_survives_the_round_trip(trace, tmp_path):
    path = tmp_path / "trace.safetensors"
    save_trace(trace, path)
    assert_same(load_trace(path, verify=True), trace)


# --- inconsistent values ------------------------------------------------------------------------------

NAN = float("nan")

BAD_TRACES = {
    "expert id too large": (changed("experts", (3, 1, 0), 6), "experts[token 3, layer 1, rank 0] is 6"),
    "expert id below -1": (changed("experts", (0, 0, 1), -2), "is -2; an expert is 0 to 5, or -1 for none"),
    "expert twice": (
        changed("experts", (1, 0, 1), 2),
        "experts[token 1, layer 0, rank 1] is 2; the same expert",
    ),
    "-1 before an expert": (changed("experts", (0, 0, 0), -1), "rank 1] is 1; it follows a -1"),
    "NaN weight": (changed("weights", (4, 0, 1), NAN), "weights[token 4, layer 0, rank 1] is nan"),
    "infinite weight": (changed("weights", (4, 0, 0), np.inf), "is inf; a gate weight must be finite"),
    "negative weight": (
        changed("weights", (4, 0, 1), -0.5),
        "is -0.5; a gate weight must be finite and not neg",
    ),
    "ascending weights": (changed("weights", (1, 0, 1), 0.875), "exceeds the rank before"),
    "weight without expert": (changed("weights", (2, 0, 1), 0.25), "must be 0 where there is no expert"),
    "falling step": (changed("step", 4, 1), "step falls from 2 to 1 at token 4"),
    "negative step": (changed("step", 0, -1), "step[token 0] is -1"),
    "unknown phase": (changed("phase", 5, 2), "phase[token 5] is 2; allowed are 0 (prefill) and 1 (decode)"),
    "request without domain": (changed("request", 5, 2), "request[token 5] is 2"),
    "negative request": (changed("request", 0, -1), "request[token 0] is -1"),
    "jumping position": (changed("position", 2, 3), "position of request 0 goes from 1 to 3 at token 2"),
    "standing position": (changed("position", 1, 0), "inside a request it must rise by one"),
    "negative position": (changed("position", 0, -1), "position[token 0] is -1"),
    "decode before prefill": (
        changed("phase", 0, DECODE),
        "phase of request 0 goes from decode back to prefill",
    ),
    "negative token id": (changed("token_ids", 1, -1), "token_ids[token 1] is -1"),
    "infinite logit": (
        changed("router_logits", (0, 1, 2), -np.inf),
        "router_logits[token 0, layer 1, rank 2] is",
    ),
    "negative norm": (changed("expert_output_norm", (0, 0, 0), -1), "a norm must be finite and not negative"),
    "cosine beyond 1": (changed("residual_cosine", (2, 1), 1.5), "residual_cosine[token 2, layer 1] is 1.5"),
    "NaN cosine": (changed("residual_cosine", (2, 1), NAN), "a cosine must be between -1 and 1"),
    "foretold twice": (
        changed("lookahead_experts", (0, 0, 0, 3), 5),
        "lookahead_experts[token 0, layer 0, depth 1, rank 3] is 5; the same expert",
    ),
    "foretold unknown": (changed("lookahead_experts", (0, 0, 0, 0), 9), "is 9; an expert is 0 to 5"),
    "foretold after -1": (changed("lookahead_experts", (0, 0, 0, 1), -1), "it follows a -1"),
    "foretold beyond the last layer": (
        changed("lookahead_experts", (0, 1, 0, 0), 3),
        "must be -1 where layer + depth is beyond the last of 2 layers",
    ),
    "score ascending": (changed("lookahead_scores", (0, 0, 0, 3), 0.5), "exceeds the rank before"),
    "score above 1": (changed("lookahead_scores", (0, 0, 0, 0), 2), "a probability must be between 0 and 1"),
    "NaN score": (
        changed("lookahead_scores", (5, 0, 0, 0), NAN),
        "lookahead_scores[token 5, layer 0, depth 1",
    ),
    "lookahead without scores": (
        small_trace(lookahead_scores=None),
        "lookahead needs both experts and scores",
    ),
    "lookahead too deep": (
        small_trace(
            lookahead_experts=np.full((6, 2, 2, 4), -1, np.int8),
            lookahead_scores=np.zeros((6, 2, 2, 4), np.float16),
        ),
        "depth 2; it must be 1 to 1",
    ),
    "lookahead too narrow": (
        small_trace(
            lookahead_experts=small_trace().lookahead_experts[..., :3],
            lookahead_scores=small_trace().lookahead_scores[..., :3],
        ),
        "ranks 3 experts; it must be at least 4 (twice top-k)",
    ),
    "float experts": (small_trace(experts=small_trace().experts.astype(np.float32)), "experts is float32"),
    "wide weights": (
        small_trace(weights=small_trace().weights.astype(np.float64)),
        "must be float16 or float32",
    ),
    "too few layers": (small_trace(weights=small_trace().weights[:, :1]), "it must be [T=6, L=2, K=2]"),
    "too few tokens": (small_trace(step=small_trace().step[:5]), "step has shape [5]; it must be [T=6]"),
    "missing experts": (small_trace(experts=None), "the array 'experts' is missing"),
    "no tokens": (
        small_trace(**{name: array[:0] for name, array in present_arrays(small_trace()).items()}),
        "the trace has no tokens",
    ),
    "int8 for 200 experts": (
        small_trace(model=ModelSpec("tiny", 2, 200, 2), router_logits=None),
        "experts is int8; 200 experts need int16",
    ),
    "k above experts": (
        small_trace(model=ModelSpec("tiny", 2, 1, 2)),
        "model.top_k is 2; it must be at most",
    ),
    "no layers": (small_trace(model=ModelSpec("tiny", 0, 6, 2)), "model.layers is 0"),
    "layers not a number": (small_trace(model=ModelSpec("tiny", "2", 6, 2)), "model.layers is '2'"),
    "no bytes": (
        small_trace(model=ModelSpec("tiny", 2, 6, 2, expert_bytes={"bf16": 0})),
        "expert_bytes['bf16']",
    ),
    "unknown kind": (small_trace(provenance=Provenance("record", "", "")), "did you mean 'recorded'?"),
    "not JSON": (
        small_trace(provenance=Provenance("recorded", "", "", {"when": {1, 2}})),
        "metadata must hold JSON values only",
    ),
    "order neither known nor unknown": (small_trace(ranked=None), "ranked is None; it must be true or false"),
    "domain not a text": (small_trace(domains=("prose", None)), "domains[1] is None"),
}


@pytest.mark.parametrize(("trace", "words"), BAD_TRACES.values(), ids=BAD_TRACES.keys())
def test_an_inconsistent_trace_is_not_saved(trace, words, path):
    with pytest.raises(InputError) as caught:
        save_trace(trace, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_faults_are_found_in_every_block(monkeypatch):
    """Checking block by block names the token of the whole trace."""
    monkeypatch.setattr("traces.checks.BLOCK_VALUES", 1)
    validate_trace(small_trace(), "here")
    with pytest.raises(InputError, match=r"here: experts\[token 3, layer 1, rank 0\] is 6"):
        validate_trace(changed("experts", (3, 1, 0), 6), "here")


def test_equal_and_rounded_weights_are_in_order():
    """Half precision may turn equal weights around by one rounding."""
    above = np.nextafter(np.float16(0.25), np.float16(1))
    validate_trace(changed("weights", (1, 0), [0.25, above]), "here")
    with pytest.raises(InputError, match="descending order"):
        validate_trace(changed("weights", (1, 0), [0.25, above + np.float16(0.01)]), "here")


# --- damaged and foreign files ------------------------------------------------------------------------


def parts(path):
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def rejection(path, **options):
    with pytest.raises(InputError) as caught:
        load_trace(path, **options)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("experts", "dtype"), "F32", "'experts' of shape [6, 2, 2] needs 96 bytes"),
        (("experts", "dtype"), "U8", "experts is uint8; it must be int8 or int16"),
        (("experts", "dtype"), "BF16", "element type 'BF16'"),
        (("experts", "shape"), [6, 4], "experts has shape [6, 4]; it must be [T=6, L=2, K=2]"),
        (("experts", "shape"), [6, -4], "it must be a list of whole numbers"),
        (("experts", "shape"), [10**12, 2, 2], "needs 4,000,000,000,000 bytes"),
        (("experts", "shape"), [2**62, 2**62, 0], "its data_offsets span 24"),
        (("experts", "data_offsets"), [0, 24], "overlaps the array before it"),
        (("experts", "data_offsets"), [24, 0], "they must be [begin, end]"),
        (("experts", "data_offsets"), "all", "they must be [begin, end]"),
        (("experts",), [1], "must have dtype, shape and data_offsets"),
        (("__metadata__", "model"), 3, "__metadata__ must map names to texts"),
        (
            ("__metadata__", "foregate_trace"),
            "2",
            "the schema version is '2'; this program reads version '1'",
        ),
        (("__metadata__", "domains"), "prose", "'domains' is not valid JSON"),
        (("__metadata__", "domains"), "{}", "must be a list with the domain of each request"),
        (("__metadata__", "domains"), '["prose"]', "request[token 3] is 1"),
        (("__metadata__", "model"), "[]", "the metadata 'model' must be a JSON object"),
        (("__metadata__", "model"), "{}", "'model' is incomplete"),
        (("__metadata__", "model"), '{"layer": 2}', "unknown field 'model.layer'; did you mean 'layers'?"),
        (("__metadata__", "author"), "me", "unknown metadata 'author'"),
        (("__metadata__", "ranked"), "true", "'ranked' is 'true'; it must be 'false' or absent"),
        (("__metadata__", "hash"), "abc", "the hash is 'abc'; it must be 64 hexadecimal digits"),
        (("__metadata__", "provenance"), '{"details": NaN}', "NaN is no JSON value"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(saved, place, value, words):
    header, data = parts(saved)
    *into, last = place
    target = header[into[0]] if into else header
    target[last] = value
    write(saved, header, data)
    assert words in rejection(saved)


def test_an_unknown_array_is_refused(saved):
    arrays = {**load_file(saved), "expert": np.zeros(6, np.int8)}
    with safe_open(saved, "np") as file:
        metadata = file.metadata()
    save_file(arrays, saved, metadata)
    assert "unknown array 'expert'; did you mean 'experts'?" in rejection(saved)


@pytest.mark.parametrize("name", [name for name, spec in ARRAYS.items() if spec.required])
def test_a_missing_array_is_refused(saved, name):
    with safe_open(saved, "np") as file:
        metadata = file.metadata()
    arrays = load_file(saved)
    del arrays[name]
    save_file(arrays, saved, metadata)
    assert f"the array '{name}' is missing" in rejection(saved)


def test_missing_metadata_is_refused(saved):
    header, data = parts(saved)
    del header["__metadata__"]["hash"]
    write(saved, header, data)
    assert "the metadata 'hash' is missing" in rejection(saved)


def test_another_program_s_safetensors_file_is_refused(path):
    save_file({"layer.weight": np.zeros(3, np.float32)}, path)
    assert "its metadata lacks 'foregate_trace'" in rejection(path)


def test_a_hole_between_arrays_is_refused(saved):
    header, data = parts(saved)
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]
    write(saved, header, data + bytes(8))
    assert "leaves a hole before it" in rejection(saved)


def test_trailing_bytes_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    assert "4 trailing bytes" in rejection(saved)


@pytest.mark.parametrize("keep", [1, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    assert "truncated" in (sentence := rejection(saved)) or "not a .safetensors trace" in sentence


def test_a_file_that_claims_to_be_huge_is_refused_without_allocating(saved):
    header, data = parts(saved)
    begin, end = header["phase"]["data_offsets"]
    assert end == len(data), "phase is the last array, so that its claim overlaps no other"
    header["phase"].update(shape=[10**12], data_offsets=[begin, begin + 10**12])
    write(saved, header, data)
    assert "the file is truncated: its header promises 1,000,000,000,552 bytes" in rejection(saved)


def test_a_huge_header_is_refused(path):
    path.write_bytes(struct.pack("<Q", 10**15) + b"{}")
    assert "not a .safetensors trace" in rejection(path)


@pytest.mark.parametrize("text", [b"{" * 50_000, b'{"a": }', b'{"a": 1, "a": 1}', b'{"\xff": 1}', b'{"a": NaN}x'])
def test_a_header_that_is_not_json_is_refused(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "the header is not valid JSON" in rejection(path)


def test_a_changed_value_is_found_by_its_hash(saved):
    header, data = parts(saved)
    begin, _ = header["router_logits"]["data_offsets"]
    data = bytearray(data)
    data[begin] ^= 1
    write(saved, header, bytes(data))
    load_trace(saved)
    assert "hash is" in (sentence := rejection(saved, verify=True))
    assert "the file was changed" in sentence


def test_changed_metadata_is_found_by_its_hash(saved):
    header, data = parts(saved)
    header["__metadata__"]["domains"] = '["verse",""]'
    write(saved, header, data)
    assert "the file was changed" in rejection(saved, verify=True)


def bad_pickle(path):
    path.write_bytes(pickle.dumps({"experts": [1, 2, 3]}))


def bad_torch(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


def bad_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def bad_npz(path):
    with path.open("wb") as file:
        np.savez(file, experts=np.zeros(3))


def bad_npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    ("make", "looks"),
    [
        (bad_pickle, "a Python pickle"),
        (bad_torch, "a PyTorch file"),
        (bad_npz, "a NumPy .npz archive"),
        (bad_npy, "a NumPy .npy file"),
        (bad_zip, "a zip archive"),
        (lambda path: path.write_bytes(b"PK\x03\x04 broken archive"), "a damaged zip archive"),
        (lambda path: path.write_text('{"experts": [1, 2, 3]}'), "JSON text"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20)), "an HDF5 file"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00" + bytes(20)), "a gzip archive"),
        (lambda path: path.write_text("routing of tokens\n"), "no known format"),
    ],
)
def test_a_foreign_file_is_named_for_what_it_is(path, make, looks):
    make(path)
    assert looks in (sentence := rejection(path))
    assert "`foregate trace import`" in sentence


def test_a_file_that_is_absent_or_empty_or_a_folder_is_refused(tmp_path):
    assert "no such file" in rejection(tmp_path / "absent.safetensors")
    assert "this is a folder" in rejection(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    assert "the file is empty" in rejection(tmp_path / "empty.safetensors")


# --- writing ------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_trace(small_trace(domains=("other", "")), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_rename_leaves_nothing(path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("refused")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="refused"):
        save_trace(small_trace(), path)
    assert list(path.parent.iterdir()) == []


def test_a_trace_may_be_saved_over_the_file_it_is_a_view_of(saved):
    part = slice_requests(load_trace(saved), [1])
    save_trace(part, saved)
    assert_same(load_trace(saved, verify=True), part)


def test_saving_needs_a_folder_and_the_right_suffix(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.safetensors, not in '\.npz'"):
        save_trace(small_trace(), tmp_path / "trace.npz")
    with pytest.raises(InputError, match="does not exist"):
        save_trace(small_trace(), tmp_path / "absent" / "trace.safetensors")


# --- parts --------------------------------------------------------------------------------------------


def test_take_tokens_cuts_the_last_request():
    part = take_tokens(small_trace(), 4)
    validate_trace(part, "part")
    assert part.request.tolist() == [0, 0, 0, 1]
    assert part.step.tolist() == [0, 0, 1, 2]
    assert part.domains == ("prose", "")


def test_take_tokens_at_the_end_of_a_request_drops_the_rest():
    part = take_tokens(small_trace(), 3)
    assert part.domains == ("prose",)
    assert part.tokens == 3


def test_take_tokens_of_a_short_trace_is_the_trace():
    whole = small_trace()
    assert take_tokens(whole, 6) is whole


def test_take_tokens_takes_requests_in_the_order_they_begin():
    """In a batched trace, requests interleave: request 1 begins first and comes whole."""
    batched = small_trace(
        request=np.array([1, 0, 1, 0, 1, 0], np.int32),
        position=np.array([0, 0, 1, 1, 2, 2], np.int32),
        step=np.array([0, 0, 1, 1, 2, 2], np.int32),
        phase=np.ones(6, np.uint8),
    )
    part = take_tokens(batched, 4)
    validate_trace(part, "part")
    assert part.request.tolist() == [0, 1, 0, 0]
    assert part.position.tolist() == [0, 0, 1, 2]
    assert part.step.tolist() == [0, 0, 1, 2]
    assert part.domains == ("", "prose")
    np.testing.assert_array_equal(part.experts, batched.experts[[0, 1, 2, 4]])


def test_slice_requests_renumbers_requests_and_steps():
    part = slice_requests(small_trace(), [1])
    validate_trace(part, "part")
    assert part.request.tolist() == [0, 0, 0]
    assert part.step.tolist() == [0, 0, 1]
    assert part.position.tolist() == [7, 8, 9]
    assert part.domains == ("",)


def test_a_part_is_a_view_and_names_the_whole(saved):
    whole = load_trace(saved)
    part = take_tokens(slice_requests(whole, [1]), 2)
    assert np.shares_memory(part.experts, whole.experts)
    assert part.hash == ""
    assert part.provenance.details["part_of"] == {"hash": whole.hash, "tokens": 2, "requests": 1}


@pytest.mark.parametrize(
    ("requests", "words"),
    [([], "none is named"), ([2], "2 has no tokens"), ([0, 0], "names a request twice")],
)
def test_slice_requests_refuses(requests, words):
    with pytest.raises(InputError, match=words):
        slice_requests(small_trace(), requests)


def test_take_tokens_refuses_nothing():
    with pytest.raises(InputError, match="take at least 1"):
        take_tokens(small_trace(), 0)


# --- bundled ------------------------------------------------------------------------------------------


def test_bundled_recordings_are_whole_and_small():
    found = bundled()
    assert "reference_16x64_top8" in found
    for path in found.values():
        assert Path(path).stat().st_size <= 12_000_000
        assert load_trace(path, verify=True).provenance.kind == "recorded"


def test_the_bundled_reference_has_what_policies_need():
    trace = load_trace(bundled()["reference_16x64_top8"])
    assert trace.capabilities() == {"weights", "lookahead", "logits"}
    assert (trace.tokens, trace.steps, len(set(trace.domains))) == (14 * 160, 14 * 97, 7)
    assert trace.lookahead_experts.shape == (2240, 16, 3, 16)
    assert trace.model.expert_bytes == {"bf16": 786_432}
    parameters = trace.model.other_bytes // 2 + 16 * 64 * trace.model.expert_bytes["bf16"] // 2
    assert round(parameters / 1e6, 1) == 428.4


def test_replaced_metadata_changes_the_hash():
    renamed = small_trace(model=replace(small_trace().model, name="other"))
    assert content_hash(renamed) != content_hash(small_trace())
