"""Whatever happens to a file, an importer returns a trace or refuses it in one sentence."""

import json

import pytest
import test_importer_llama_cpp as llama_cpp
import test_importer_llama_cpp_binary as binary
import test_importer_route_trace as route_trace
import test_importer_sglang as sglang
import test_importer_vllm as vllm
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import InputError, import_trace, importers

WHOLE = {
    "vllm": (json.dumps(vllm.response()).encode(), {"experts": 6}),
    "sglang": (json.dumps(sglang.response()).encode(), sglang.SHAPE),
    "llama_cpp_csv": (llama_cpp.WRITTEN["llama_cpp_csv"][0].encode(), {"experts": 6, "top_k": 2}),
    "llama_cpp_jsonl": (llama_cpp.WRITTEN["llama_cpp_jsonl"][0].encode(), {"experts": 6}),
    "llama_cpp_binary": (binary.header() + binary.records(), binary.OPTIONS),
    "route_trace": ((route_trace.HEAD + route_trace.COLUMNS + route_trace.rows()).encode(), {}),
}
"""A good file of each format, and what its reader needs to be told; .npz and .pt archives have checksums of their own."""


def outcome(path, format, options):  # noqa: A002
    """Return the sentence of a refusal, "" for a trace; anything else is raised."""
    try:
        import_trace(path, format, **options)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("format", WHOLE)
@given(data=st.data())
def test_damage_gives_a_trace_or_a_sentence(tmp_path_factory, format, data):  # noqa: A002
    content, options = WHOLE[format]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.integers(0, len(damaged)))
    path = tmp_path_factory.mktemp("damaged") / "file"
    path.write_bytes(damaged[:kept])
    sentence = outcome(path, format, options)
    assert sentence == "" or sentence.startswith(f"{path}: ")
    assert "\n" not in sentence


@pytest.mark.parametrize("format", importers())
def test_what_is_no_file_is_refused(tmp_path, format, capsys):  # noqa: A002
    options = WHOLE.get(format, (b"", {}))[1]
    assert "there is no such file" in refusal(tmp_path / "absent", format, **options)
    assert "this is a folder" in refusal(tmp_path, format, **options)
    empty = tmp_path / "empty"
    empty.touch()
    assert_command_refuses(empty, format, capsys, **options)
