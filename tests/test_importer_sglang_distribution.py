"""SGLang's per-token dump: physical ids become logical ones, padding goes, and nothing in the file is run."""

import os
import pickle
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace

torch = pytest.importorskip("torch", reason="a .pt file is written and read with torch (pip install 'foregate[real]')")

LOGICAL = [[0, 1, 2, 3, 0], [0, 1, 2, 3, 3], [3, 2, 1, 0, 1]]
"""Of the five physical experts of three layers; the first layer is dense, and the map says something of it too."""

NONE = [-1] * 8


def padded(*experts):
    return list(experts) + [-1] * (8 - len(experts))


def record(layers, *, mode=2, **changes):
    """Return one forward pass; `layers` gives [layer][token] the 8 physical ids."""
    tokens = len(layers[0])
    found = {
        "forward_pass_id": 7,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(100, 100 + tokens)),
        "positions": list(range(tokens)),
        "extend_seq_lens": [tokens] if mode == 1 else None,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(layers, dtype=torch.int32).reshape(len(layers), tokens, 8),
        "misc_objects": [],
        "global_physical_count": torch.zeros(3, 5, dtype=torch.int32),
        **changes,
    }
    return {name: value for name, value in found.items() if value is not ...}


PROMPT = [[NONE] * 2, [padded(4, 0), padded(1, 2)], [padded(0, 4), padded(3, 1)]]
ANSWER = [[NONE], [padded(2, 3)], [padded(1, 0)]]


def two_passes():
    return [record(PROMPT, mode=1), record(ANSWER, positions=[2], input_ids=[5])]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "expert_distribution_recorder_1_0.pt"


def save(path, records, logical=LOGICAL):
    logical = torch.tensor(logical) if isinstance(logical, list) else logical
    torch.save({"records": records, "last_physical_to_logical_map": logical}, path)
    return path


def read(path, records, **options):
    return import_trace(save(path, records), "sglang_distribution", **options)


def test_physical_ids_become_logical_and_padding_goes(path):
    trace = read(path, two_passes())
    assert trace.experts.tolist() == [[[3, 0], [3, 1]], [[1, 2], [0, 2]], [[2, 3], [2, 3]]]
    assert (trace.model.layers, trace.model.experts, trace.model.top_k) == (2, 4, 2)
    assert trace.provenance.details["layers_with_experts"] == [1, 2]
    assert trace.token_ids.tolist() == [100, 101, 5]


def test_forward_passes_are_steps_and_modes_are_phases(path):
    trace = read(path, two_passes())
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.position.tolist() == [0, 1, 2]


def test_without_names_every_stretch_is_a_request(path):
    trace = read(path, two_passes())
    assert trace.request.tolist() == [0, 0, 1]
    assert "which passes belong to one request" in trace.provenance.details["unknown"]


def test_named_requests_go_on_over_passes(path):
    prompt = record(PROMPT, mode=1, extend_seq_lens=[1, 1], positions=[0, 0], rids=["a", "b"])
    answer = record([[NONE] * 2, *PROMPT[1:]], positions=[1, 1], rids=["b", "a"])
    trace = read(path, [prompt, answer])
    assert trace.request.tolist() == [0, 1, 1, 0]
    assert "which passes belong to one request" not in trace.provenance.details["unknown"]


def test_an_idle_pass_is_no_step(path):
    idle = record([[], [], []], mode=4)
    assert read(path, [idle, *two_passes()]).step.tolist() == [0, 0, 1]


def test_what_the_recorder_does_not_say_stays_unknown(path):
    trace = read(path, two_passes())
    assert (trace.weights, trace.ranked, trace.capabilities()) == (None, False, frozenset())
    assert "whether the mapping of experts changed while recording" in trace.provenance.details["unknown"]
    assert read(path, two_passes(), model_name="tiny").model.name == "tiny"


@given(
    st.lists(st.lists(st.permutations(range(4)), min_size=1, max_size=3), min_size=1, max_size=3), st.permutations(range(4))
)
def test_every_routing_survives_its_placement(tmp_path_factory, passes, placement):
    """Top-3 of four experts, each at the physical place that `placement` gives it."""
    path = tmp_path_factory.mktemp("sglang") / "dump.pt"
    logical = [placement.index(place) for place in range(4)]
    rows = [[padded(*(placement[expert] for expert in token[:3])) for token in one] for one in passes]
    save(path, [record([one]) for one in rows], [logical])
    trace = import_trace(path, "sglang_distribution")
    assert trace.experts[:, 0].tolist() == [token[:3] for one in passes for token in one]


BAD = {
    "no records": ({"records": []}, "records is []; it must be a list with at least one forward pass"),
    "another mode of the recorder": (
        [record(ANSWER, topk_ids_of_layer=...)],
        "has no topk_ids_of_layer; the recorder's mode",
    ),
    "list for a tensor": ([record(ANSWER, topk_ids_of_layer=[1])], "topk_ids_of_layer is list; it must be a dense tensor"),
    "floats": ([record(ANSWER, topk_ids_of_layer=torch.zeros(3, 1, 8))], "is float32 of shape [3, 1, 8]; it must be whole"),
    "flat": ([record(ANSWER, topk_ids_of_layer=torch.zeros(8, dtype=torch.int32))], "is int32 of shape [8]"),
    "other layers": ([record(ANSWER[1:])], "has 2 layers; last_physical_to_logical_map has 3"),
    "unknown expert": ([record([[NONE], [padded(5)], [NONE]])], "holds 5; a physical expert is 0 to 4"),
    "same expert": ([record([[NONE], [padded(3, 4)], [padded(1, 0)]])], "the same expert is already there"),
    "no expert": ([record([[NONE]] * 3)], "topk_ids_of_layer holds no expert"),
    "mixed pass": ([record(ANSWER, forward_mode=3)], "records[0].forward_mode is 3; it must be 1 (extend) or 2 (decode)"),
    "no mode": ([record(ANSWER, forward_mode=...)], "records[0].forward_mode is None; it must be a whole number"),
    "no lengths": ([record(PROMPT, mode=1, extend_seq_lens=...)], "extend_seq_lens is None; it must be a list"),
    "short lengths": ([record(PROMPT, mode=1, extend_seq_lens=[1])], "extend_seq_lens add up to 1; topk_ids_of_layer has 2"),
    "few positions": ([record(PROMPT, mode=1, positions=[0])], "positions must be a list of 2 whole numbers"),
    "odd token": ([record(ANSWER, input_ids=["a"])], "input_ids is 'a'; it must be a whole number of at least 0"),
    "few names": ([record(PROMPT, rids=["a"])], "rids must be a list that names each of 2 sequences"),
    "jump": ([record(PROMPT, mode=1, positions=[0, 5])], "inside a request it must rise by one"),
    "only idle": ([record([[], [], []], mode=4)], "no pass has tokens"),
    "record a number": ([3], "records[0] has no topk_ids_of_layer"),
}


@pytest.mark.parametrize(("records", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_dump_is_refused(path, records, words):
    save(path, records["records"] if isinstance(records, dict) else records)
    assert words in refusal(path, "sglang_distribution")


@pytest.mark.parametrize(
    ("logical", "words"),
    [
        (None, "last_physical_to_logical_map is NoneType; it must be a dense tensor"),
        ([[0, 1, 3, 3, 3]] * 3, "last_physical_to_logical_map[0] names 3 of 4 experts; each must have a physical copy"),
        ([[0, -1]] * 3, "last_physical_to_logical_map must hold experts, 0 to at most"),
    ],
)
def test_a_wrong_mapping_is_refused(path, logical, words):
    save(path, two_passes(), logical)
    assert words in refusal(path, "sglang_distribution")


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_nothing_in_the_file_is_run(path, monkeypatch):
    torch.save({"records": [Harmful()]}, path)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it was run"))
    assert "damaged or holds more than tensors and plain values" in refusal(path, "sglang_distribution")


def test_a_bare_pickle_is_refused(path):
    path.write_bytes(pickle.dumps({"records": []}))
    assert "this is no whole .pt archive" in refusal(path, "sglang_distribution")


def test_a_compressed_archive_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dump/data.pkl", bytes(2**20))
    assert "'dump/data.pkl' is compressed, which torch.save never does" in refusal(path, "sglang_distribution")


def test_a_view_that_poses_as_more_than_is_there_is_refused(path):
    posing = torch.zeros(1, dtype=torch.int32).expand(3, 10**12, 8)
    save(path, [record(ANSWER, topk_ids_of_layer=posing)])
    assert "its tensors claim 96,000,000,000,120 bytes" in refusal(path, "sglang_distribution")


@pytest.mark.parametrize("keep", [0, 10, 400, -10])
def test_a_truncated_file_is_refused(path, keep):
    save(path, two_passes())
    path.write_bytes(path.read_bytes()[:keep])
    sentence = refusal(path, "sglang_distribution")
    assert "the file is empty" in sentence if keep == 0 else "this is no whole .pt archive" in sentence


def test_another_object_is_refused(path):
    torch.save([1], path)
    assert "it holds list; the recorder writes a dictionary" in refusal(path, "sglang_distribution")


def test_the_command_says_it_in_a_sentence(path, capsys):
    save(path, [])
    assert_command_refuses(path, "sglang_distribution", capsys)
