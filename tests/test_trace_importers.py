"""Importers: found by their files, exact on what they read, and not to be fooled."""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from traces import DECODE, PREFILL, InputError, import_trace, importers, load_trace, save_trace

SHARED = Path(__file__).parents[2] / "shared"


def shared(name):
    """Return the path of a published recording; skip where this checkout has none beside it."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not beside this checkout")
    return path


META = {"model": "tiny", "num_layers": 2, "num_experts": 6, "top_k": 2, "phase": "decode", "source": "a test"}


def plain_arrays(**changes):
    """Two requests of 3 and 2 tokens; None leaves an array out."""
    experts = np.array([[[0, 1], [5, 4]]] * 5, np.uint8)
    arrays = {
        "experts": experts,
        "weights": np.full((5, 2, 2), 0.5, np.float16),
        "offsets": np.array([0, 3, 5]),
        "meta": META,
        **changes,
    }
    if isinstance(arrays["meta"], dict):
        arrays["meta"] = json.dumps(arrays["meta"]).encode()
    if isinstance(arrays["meta"], bytes):
        arrays["meta"] = np.frombuffer(arrays["meta"], np.uint8)
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "recording.npz"


def read(path, **options):
    return import_trace(path, "plain_arrays", **options)


def rejection(path, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- discovery ----------------------------------------------------------------------------------------


def test_formats_are_the_folder_s_modules():
    assert "plain_arrays" in importers()
    assert not any(name.startswith("_") for name in importers())


@pytest.mark.parametrize("name", importers())
def test_every_format_describes_itself(name):
    module = importers()[name]
    assert module.__doc__
    assert callable(module.read)


def test_unknown_formats_and_options_are_refused(path):
    with pytest.raises(InputError, match="'plain_array' cannot be imported; did you mean 'plain_arrays'"):
        import_trace(path, "plain_array")
    with pytest.raises(InputError, match="unknown option 'model'; did you mean 'model_name'"):
        import_trace(path, "plain_arrays", model="x")


def test_without_torch_a_pt_file_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "dump.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dump/data.pkl", b"\x80\x02}.")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch, which is not installed: pip install 'foregate\[real\]'"):
        import_trace(path, "sglang_distribution")


# --- plain arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_decode_is_one_step_per_token(path, save):
    save(path, **plain_arrays())
    trace = read(path)
    assert trace.experts.dtype == np.int8
    assert trace.experts[4].tolist() == [[0, 1], [5, 4]]
    assert trace.request.tolist() == [0, 0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1]
    assert trace.step.tolist() == [0, 1, 2, 3, 4]
    assert set(trace.phase) == {DECODE}
    assert trace.domains == ("", "")


def test_prefill_is_one_step_per_request(path):
    np.savez(path, **plain_arrays(meta={**META, "phase": "prefill", "task": "intent", "num_shared": 2}))
    trace = read(path)
    assert trace.step.tolist() == [0, 0, 0, 1, 1]
    assert set(trace.phase) == {PREFILL}
    assert trace.domains == ("intent", "intent")
    assert trace.model.shared_experts == 2


def test_sequences_give_first_positions_and_domains(path):
    sequences = [{"dataset": "mmlu", "category": "law", "pos0": 40, "tokens": 3}, {"dataset": "gpqa"}]
    np.savez(path, **plain_arrays(meta={**META, "sequences": sequences}))
    trace = read(path)
    assert trace.position.tolist() == [40, 41, 42, 0, 1]
    assert trace.domains == ("mmlu/law", "gpqa")


def test_what_the_file_does_not_say_stays_unknown(path):
    np.savez(path, **plain_arrays())
    trace = read(path)
    assert (trace.model.name, trace.model.expert_bytes, trace.model.other_bytes) == ("tiny", {}, None)
    assert (trace.provenance.kind, trace.provenance.source) == ("imported", "a test")
    assert "bytes of experts and of everything else" in trace.provenance.details["unknown"]
    assert trace.capabilities() == {"weights"}
    assert read(path, model_name="other").model.name == "other"


def recording():
    """A recording like the reference one: no meta, but logits, phase and lookahead."""
    cross = np.full((5, 2, 1, 4), 255, np.uint8)
    cross[:, 0, 0] = [3, 2, 1, 0]
    scores = np.where(cross == 255, np.float16(-1), np.float16(0.25))
    return plain_arrays(
        meta=None,
        router_logits=np.zeros((5, 2, 6), np.float16),
        phase=np.array([0, 0, 1, 0, 1], np.uint8),
        position=np.array([0, 1, 2, 0, 1], np.int32),
        token_ids=np.arange(5, dtype=np.uint16),
        cross_ids=cross,
        cross_scores=scores,
        expert_out_norm=np.ones((5, 2, 2), np.float16),
        seq_domain=np.array([1, 0], np.uint8),
        domain_names=np.array(["code", "prose"]),
    )


def test_a_recording_brings_all_that_it_has(path):
    np.savez_compressed(path, **recording())
    trace = read(path)
    assert (trace.model.experts, trace.model.name, trace.provenance.kind) == (6, "recording", "recorded")
    assert trace.step.tolist() == [0, 0, 1, 2, 3]
    assert trace.domains == ("prose", "code")
    assert trace.lookahead_experts[0, 0, 0].tolist() == [3, 2, 1, 0]
    assert trace.lookahead_experts[0, 1, 0].tolist() == [-1] * 4
    assert trace.lookahead_scores[0, :, 0, 0].tolist() == [0.25, 0]
    assert trace.token_ids.dtype == np.int32
    assert trace.expert_output_norm is not None


BAD = {
    "missing experts": ({"experts": None}, "the array 'experts' is missing; the archive has"),
    "missing weights": ({"weights": None}, "the array 'weights' is missing"),
    "missing offsets": ({"offsets": None}, "the array 'offsets' is missing"),
    "missing meta": ({"meta": None}, "the array 'meta' is missing; without it"),
    "float experts": ({"experts": np.zeros((5, 2, 2))}, "'experts' is float64; it must be whole numbers"),
    "flat experts": (
        {"experts": np.zeros((5, 4), np.uint8)},
        "'experts' has shape [5, 4]; it must have 3 axes",
    ),
    "wrong id": ({"experts": np.full((5, 2, 2), 255, np.uint8)}, "'experts' holds 255; an expert is 0 to 5"),
    "negative id": ({"experts": np.full((5, 2, 2), -1, np.int8)}, "'experts' holds -1"),
    "same expert": ({"experts": np.zeros((5, 2, 2), np.uint8)}, "the same expert is already there"),
    "integer weights": ({"weights": np.ones((5, 2, 2), int)}, "'weights' is int64; it must be floats"),
    "wide weights": ({"weights": np.ones((5, 2, 2))}, "'weights' is float64; it must be float16 or float32"),
    "short weights": ({"weights": np.ones((4, 2, 2), np.float16)}, "weights has shape [4, 2, 2]"),
    "NaN weights": (
        {"weights": np.full((5, 2, 2), np.nan, np.float16)},
        "weights[token 0, layer 0, rank 0] is nan",
    ),
    "object weights": ({"weights": np.array([{}], object)}, "holds Python objects (a pickle)"),
    "falling offsets": ({"offsets": np.array([0, 4, 3, 5])}, "'offsets' must rise from 0 to the 5 tokens"),
    "short offsets": ({"offsets": np.array([0, 4])}, "'offsets' must rise from 0 to the 5 tokens"),
    "empty request": ({"offsets": np.array([0, 3, 3, 5])}, "'offsets' must rise"),
    "scalar offsets": ({"offsets": np.array(5)}, "'offsets' has shape []; it must have 1 axes"),
    "meta not JSON": ({"meta": b"{"}, "'meta' is not valid JSON"),
    "meta a list": ({"meta": b"[]"}, "'meta' must be a JSON object"),
    "no model": ({"meta": {**META, "model": None}}, "meta.model is None"),
    "no layers": ({"meta": {**META, "num_layers": "2"}}, "meta.num_layers is '2'; it must be a whole number"),
    "other layers": (
        {"meta": {**META, "num_layers": 3}},
        "experts has shape [5, 2, 2]; it must be [T=5, L=3, K=2]",
    ),
    "unknown phase": (
        {"meta": {**META, "phase": "both"}},
        "meta.phase is 'both'; it must be 'prefill' or 'decode'",
    ),
    "few sequences": ({"meta": {**META, "sequences": [{}]}}, "meta.sequences has 1 entries; offsets give 2"),
    "odd sequences": ({"meta": {**META, "sequences": [1, 2]}}, "meta.sequences must be a list of objects"),
    "odd first position": (
        {"meta": {**META, "sequences": [{"pos0": -1}, {}]}},
        "meta.sequences[0].pos0 is -1; it must be a whole number",
    ),
    "huge first position": ({"meta": {**META, "sequences": [{"pos0": 2**31}, {}]}}, "beyond 2147483647"),
    "odd length": ({"meta": {**META, "sequences": [{"tokens": 9}, {}]}}, "tokens is 9; offsets give 3"),
    "huge token id": ({"token_ids": np.full(5, 2**40)}, "'token_ids' must be within"),
    "lone cross_ids": (
        {"cross_ids": np.zeros((5, 2, 1, 4), np.uint8)},
        "the array 'cross_scores' is missing",
    ),
    "odd domain": (
        {"seq_domain": np.array([0, 3]), "domain_names": np.array(["a"])},
        "'seq_domain' must give each of 2 requests one of 1 domains",
    ),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_recording_is_refused(path, changes, words):
    np.savez(path, **plain_arrays(**changes))
    sentence = rejection(path)
    assert sentence.startswith(str(path))
    assert words in sentence


# --- hostile and damaged archives -----------------------------------------------------------------------


def npy(shape, dtype="<f4", data=b""):
    """Return an .npy file that claims `shape`, whatever `data` it holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def write_entries(path, compression=zipfile.ZIP_DEFLATED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)


def test_a_decompression_bomb_is_refused_unopened(path):
    """8 MB of zeros deflate to 8 kB."""
    write_entries(path, experts=npy((2**21,), data=bytes(2**23)))
    assert "looks like a decompression bomb" in rejection(path)


def test_an_archive_beyond_the_limit_is_refused(path):
    np.savez(path, **plain_arrays())
    assert "claim more than 100 bytes unpacked; raise max_bytes" in rejection(path, max_bytes=100)


def test_a_header_that_claims_to_be_huge_is_refused_without_allocating(path):
    write_entries(path, experts=npy((10**12, 2, 2)))
    assert "needs 16,000,000,000,128 bytes, but the archive says 128" in rejection(path)


def test_an_entry_that_is_no_array_is_refused(path):
    write_entries(path, experts=b"not an array")
    assert "'experts' has no valid .npy header" in rejection(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02}.")
    assert "it holds 'data.pkl'; an .npz archive holds .npy arrays only" in rejection(path)


def test_an_array_that_is_there_twice_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts.npy", npy((1,), data=bytes(4)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("experts.npy", npy((1,), data=bytes(4)))
    assert "'experts' is there twice" in rejection(path)


@pytest.mark.parametrize("keep", [0, 10, 400, -10])
def test_a_truncated_archive_is_refused(path, keep):
    np.savez(path, **plain_arrays())
    path.write_bytes(path.read_bytes()[:keep])
    assert "this is no whole .npz archive" in rejection(path)


def test_a_damaged_byte_is_found(path):
    np.savez(path, **plain_arrays())
    content = path.read_bytes()
    at = content.index(plain_arrays()["weights"].tobytes())
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    assert "'weights' cannot be unpacked (Bad CRC-32" in rejection(path)


def test_other_files_are_refused(path, tmp_path):
    path.write_text("hello")
    assert "this is no whole .npz archive" in rejection(path)
    assert "there is no such file" in rejection(tmp_path / "absent.npz")
    assert "this is a folder" in rejection(tmp_path)


# --- the published recordings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "requests", "steps"),
    [
        ("traces/gpt_oss_20b_decode.npz", (60099, 24, 4), 195, 60099),
        ("traces/deepseek_v2_lite_intent_prefill.npz", (8222, 26, 6), 127, 127),
        ("traces/deepseek_v2_lite_translation_prefill.npz", (8251, 26, 6), 40, 40),
    ],
)
def test_published_recordings_are_imported_whole(name, shape, requests, steps, tmp_path):
    source = shared(name)
    trace = read(source)
    assert (trace.experts.shape, len(trace.domains), trace.steps) == (shape, requests, steps)
    with np.load(source) as arrays:
        np.testing.assert_array_equal(trace.experts, arrays["experts"])
        np.testing.assert_array_equal(trace.weights, arrays["weights"])
    save_trace(trace, tmp_path / "trace.safetensors")
    np.testing.assert_array_equal(load_trace(tmp_path / "trace.safetensors").experts, trace.experts)
