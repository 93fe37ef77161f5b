"""BigMoeOnEdge's route trace: turns, slots, weights or none, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import assert_command_refuses, refusal

from traces import DECODE, PREFILL, import_trace

HEAD = """# route_trace v1
# model=/models/tiny moe.gguf arch=qwen3moe n_layer=3 n_expert=6 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=500
# layer=1 expert_bytes=100 dense_bytes=20
# layer=2 expert_bytes=120 dense_bytes=20
"""
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"

CELLS = [
    ((0, 0, 0, 1), [0, 1]),
    ((0, 0, 1, 1), [2, 3]),
    ((0, 0, 1, 2), [5, 4]),
    ((0, 1, 2, 1), [1, 0]),
    ((0, 1, 2, 2), [4, 2]),
    ((1, 0, 3, 1), [3, 5]),
    ((1, 0, 3, 2), [0, 1]),
]
"""(turn, phase, step, layer) and its experts by slot: two prompt tokens of which the first skips the last layer, one token
of decode, and a second turn."""

ROUTED = [[[0, 1], [-1, -1]], [[2, 3], [5, 4]], [[1, 0], [4, 2]], [[3, 5], [0, 1]]]


def rows(cells=CELLS, weights=("0.75", "0.25")):
    return "".join(
        f"{','.join(map(str, cell))},{slot},{expert},{weights[slot]},0,100\n"
        for cell, experts in cells
        for slot, expert in enumerate(experts)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "route.csv"


def read(path, text, **options):
    path.write_text(text)
    return import_trace(path, "route_trace", **options)


def test_turns_become_requests_and_positions_go_on(path):
    trace = read(path, HEAD + COLUMNS + rows())
    assert trace.experts.tolist() == ROUTED
    assert trace.request.tolist() == [0, 0, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE, PREFILL]
    assert trace.step.tolist() == [0, 0, 1, 2]
    assert (trace.model.name, trace.model.layers, trace.model.experts, trace.model.top_k) == ("tiny moe.gguf", 2, 6, 2)


def test_weights_are_taken_as_written(path):
    trace = read(path, HEAD + COLUMNS + rows())
    assert trace.weights[1].tolist() == [[0.75, 0.25], [0.75, 0.25]]
    assert trace.weights[0, 1].tolist() == [0, 0]
    assert (trace.ranked, trace.capabilities()) == (True, {"weights"})


def test_the_order_of_rows_does_not_matter(path):
    lines = rows().splitlines(keepends=True)
    assert read(path, HEAD + COLUMNS + "".join(lines[::-1])).experts.tolist() == ROUTED


def test_columns_are_found_by_name(path):
    columns = "expert,weight,slot,layer,step,phase,turn,dropped\n"
    trace = read(path, HEAD + columns + "4,0.5,1,1,0,1,0,1\n2,0.5,0,1,0,1,0,0\n")
    assert trace.experts.tolist() == [[[2, 4]]]
    assert trace.provenance.details["routed_but_dropped"] == 1


def test_one_nan_leaves_all_weights_unknown(path):
    text = HEAD + COLUMNS + rows().replace("0.25", "nan", 1)
    trace = read(path, text)
    assert (trace.weights, trace.ranked) == (None, False)
    assert trace.provenance.details["weights_that_are_nan"] == 1
    assert trace.provenance.details["unknown"][0] == "gate weights"


def test_weights_that_rise_with_the_slot_are_kept_in_no_order(path):
    trace = read(path, HEAD + COLUMNS + rows(weights=("0.25", "0.75")))
    assert trace.weights[1, 0].tolist() == [0.25, 0.75]
    assert trace.ranked is False


def test_bytes_of_experts_are_kept_by_layer(path):
    trace = read(path, HEAD + COLUMNS + rows())
    assert trace.provenance.details["layers"] == [1, 2]
    assert trace.provenance.details["expert_bytes_of_layers"] == [100, 120]
    assert trace.model.expert_bytes == {}
    assert read(path, HEAD + COLUMNS + rows(), model_name="other").model.name == "other"


@given(st.lists(st.tuples(st.permutations(range(6)), st.permutations(range(6))), min_size=1, max_size=6), st.integers(0, 6))
def test_every_routing_survives(tmp_path_factory, tokens, prompt):
    path = tmp_path_factory.mktemp("route") / "route.csv"
    cells = [
        ((0, int(step >= prompt), step, layer), order[:2])
        for step, token in enumerate(tokens)
        for layer, order in enumerate(token, start=1)
    ]
    trace = read(path, HEAD + COLUMNS + rows(cells))
    assert trace.experts.tolist() == [[order[:2] for order in token] for token in tokens]
    assert trace.phase.tolist() == [PREFILL if step < prompt else DECODE for step in range(len(tokens))]


ONE = "0,1,0,1,0,2,0.5,0,0\n0,1,0,1,1,3,0.5,0,0\n"


def changed(old, new, count=-1):
    """Return the file of one token, top-2, with something in its rows replaced."""
    return HEAD + COLUMNS + ONE.replace(old, new, count)


BAD = {
    "empty": ("", "the file is empty"),
    "no version": (COLUMNS + ONE, "line 1 is 'turn,phase,step"),
    "other version": (
        HEAD.replace("v1", "v2") + COLUMNS + ONE,
        "line 1 is '# route_trace v2'",
    ),
    "no model": ("# route_trace v1\n" + COLUMNS + ONE, "the line '# model=... n_expert=N n_expert_used=N' is missing"),
    "huge experts": (
        HEAD.replace("n_expert=6", "n_expert=99999999") + COLUMNS + ONE,
        "line 2: n_expert is 99999999",
    ),
    "large k": (
        HEAD.replace("n_expert_used=2", "n_expert_used=7") + COLUMNS + ONE,
        "line 2: n_expert_used is 7",
    ),
    "no columns": (HEAD, "no row follows the column names"),
    "missing column": (HEAD + COLUMNS.replace("slot", "rank") + ONE, "'slot' must be there once"),
    "column twice": (HEAD + COLUMNS.replace("residency", "slot") + ONE, "'slot' must be there once"),
    "no rows": (HEAD + COLUMNS, "no row follows the column names; a recording holds at least one token"),
    "cut off": (HEAD + COLUMNS + ONE[:-12], "line 8 has 5 fields; the columns are 9"),
    "odd expert": (
        changed("2,0.5", "x,0.5"),
        "line 7: expert is 'x'; it must be",
    ),
    "unknown expert": (changed("2,0.5", "6,0.5"), "expert holds 6; an expert is 0 to 5"),
    "same expert": (changed("2,0.5", "3,0.5"), "the same expert is already there"),
    "odd phase": (
        changed("0,1,0,1,0", "0,2,0,1,0"),
        "line 7: phase is '2'; it must be a whole number, 0 to 1",
    ),
    "two phases": (changed("0,1,0,1,0", "0,0,0,1,0"), "turn 0, step 0 is both prompt and decode"),
    "odd weight": (changed("0.5", "x", 1), "line 7: weight is 'x'; it must be a number from 0, or nan"),
    "negative weight": (changed("0.5", "-1", 1), "line 7: weight is '-1'"),
    "infinite weight": (changed("0.5", "1e39", 1), "line 7: weight is '1e39'"),
    "slot beyond k": (
        changed("1,1,3", "1,2,3"),
        "a row has slot 2; with n_expert_used 2",
    ),
    "slot twice": (
        changed("1,1,3", "1,0,3"),
        "layer 1 has 2 rows; it must have slots 0 to 1, each once",
    ),
    "slot missing": (HEAD + COLUMNS + ONE[:20], "turn 0, step 0, layer 1 has 1 rows; it must have slots 0 to 1, each once"),
    "layer missing": (HEAD + COLUMNS + rows(CELLS[:4]), "turn 0, step 2, layer 2 has 0 rows; it must have slots 0 to 1"),
    "step missing": (HEAD + COLUMNS + ONE + ONE.replace("0,1,0", "0,1,2"), "inside a request it must rise by one"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD.keys())
def test_a_wrong_file_is_refused(path, text, words):
    path.write_text(text)
    assert words in refusal(path, "route_trace")


def test_the_command_says_it_in_a_sentence(path, capsys):
    path.write_text(HEAD + COLUMNS + ONE[:20])
    assert_command_refuses(path, "route_trace", capsys)
