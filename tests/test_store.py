"""Results survive the way to disk and back, whatever else lies in the directory."""

import math
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rows import make_row, make_rows

from sim.result import KINDS, Run, StepTimes, limited_by, metrics
from sim.store import FIGURES, LISTS, SCHEMA, compact, has, read_rows, stored_keys, write_row
from sim.workload import make_workload
from traces.atomic import write_atomically
from traces.errors import InputError
from traces.trace import DECODE, PREFILL, ModelSpec, Provenance, Trace


def test_the_schema_names_exactly_the_columns_that_a_run_yields():
    row = one_run()
    assert {*row, "limited_by"} == set(FIGURES)


def test_every_column_is_explained():
    text = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    short = {name: re.sub(r"^(tpot|ttft)_ms_p", "_p", name) for name in SCHEMA.names}
    assert [name for name in SCHEMA.names if f"`{short[name]}`" not in text] == []


def test_a_run_s_figures_come_back_as_they_were(tmp_path):
    row = make_row() | one_run()
    row["limited_by"] = limited_by(row)
    write_row(tmp_path, row)
    (back,) = read_rows(tmp_path).to_dict("records")
    assert list(back) == SCHEMA.names
    assert {name for name in row if not same(back[name], row[name])} == set()


def test_lists_stay_lists(tmp_path):
    row = make_row(requests=3)
    write_row(tmp_path, row)
    back = read_rows(tmp_path).iloc[0]
    assert [type(back[name]) for name in LISTS] == [list, list, list]
    assert back["request_ns"] == row["request_ns"]


def test_whole_numbers_and_fractions_keep_their_type_whatever_the_values(tmp_path):
    write_row(tmp_path, make_row(key="a", budget=1, tokens_per_s=50, hits=np.int32(3), request_ns=[1, 2]))
    write_row(tmp_path, make_row(key="b", budget=0.5, tokens_per_s=50.5, request_tokens=np.array([1, 2])))
    rows = read_rows(tmp_path)
    assert {name: str(rows[name].dtype) for name in ("budget", "tokens_per_s", "hits", "ceiling")} == {
        "budget": "float64",
        "tokens_per_s": "float64",
        "hits": "int64",
        "ceiling": "bool",
    }
    assert [type(value) for value in rows["request_ns"][0]] == [float, float]
    assert rows["request_tokens"][1] == [1, 2]


def test_a_fraction_is_refused_where_a_whole_number_is_due(tmp_path):
    with pytest.raises(ValueError, match=r"the column hits holds 1.5 where int64 is due"):
        write_row(tmp_path, make_row(hits=1.5))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_result_is_there_once_it_is_written(tmp_path):
    row = make_row()
    assert not has(tmp_path, row["key"])
    assert write_row(tmp_path, row) == tmp_path / "rows" / f"{row['key']}.parquet"
    assert has(tmp_path, row["key"])


def test_rows_come_in_the_order_asked_for_and_sorted_by_key_otherwise(tmp_path):
    for key in "bca":
        write_row(tmp_path, make_row(key=key))
    assert list(read_rows(tmp_path)["key"]) == ["a", "b", "c"]
    assert list(read_rows(tmp_path, ["c", "a", "c"])["key"]) == ["c", "a"]


def test_a_key_that_is_not_stored_is_named(tmp_path):
    write_row(tmp_path, make_row(key="a"))
    with pytest.raises(InputError, match="1 of 2 results are not stored, the first is b"):
        read_rows(tmp_path, ["a", "b"])


def test_a_copied_file_counts_once(tmp_path):
    path = write_row(tmp_path, make_row())
    path.with_name("copy.parquet").write_bytes(path.read_bytes())
    assert len(read_rows(tmp_path)) == 1


def test_files_that_are_being_written_are_not_read(tmp_path):
    path = write_row(tmp_path, make_row())
    path.with_name(f".{path.name}.0.tmp").write_bytes(b"PAR1")
    path.with_name("._note.parquet").write_bytes(b"left by another system")
    assert len(read_rows(tmp_path)) == 1


def test_many_writers_at_once_leave_whole_files_and_nothing_else(tmp_path):
    rows = make_rows(budgets=(0.25,)) * 8
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: write_row(tmp_path, row), rows))
    assert len(read_rows(tmp_path)) == len(rows) // 8
    assert {path.suffix for path in (tmp_path / "rows").iterdir()} == {".parquet"}


def test_a_failed_write_keeps_what_was_there(tmp_path):
    path = tmp_path / "figure.png"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("figure.png", b"old")]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def another_table(path):
    pd.DataFrame({"a": [1]}).to_parquet(path)


def wrong_type(path):
    rows = pd.read_parquet(path)
    rows["hits"] = "many"
    rows.to_parquet(path)


def two_rows(path):
    rows = pd.read_parquet(path)
    pd.concat([rows, rows]).to_parquet(path)


def no_rows(path):
    pd.read_parquet(path).iloc[:0].to_parquet(path)


def without_a_key(path):
    pd.read_parquet(path).assign(key=None).to_parquet(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_short, "not a whole Parquet file"),
        (empty, "not a whole Parquet file"),
        (another_table, "it lacks the column"),
        (wrong_type, "the column hits holds"),
        (two_rows, "holds 2 rows where a result is one"),
        (no_rows, "holds 0 rows where a result is one"),
        (without_a_key, "the column key is empty"),
    ],
)
def test_a_bad_file_is_named(tmp_path, damage, says):
    write_row(tmp_path, make_row(key="a"))
    path = write_row(tmp_path, make_row(key="b"))
    damage(path)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)


def test_nothing_stored_is_said(tmp_path):
    with pytest.raises(InputError, match="no results"):
        read_rows(tmp_path)


def test_a_file_without_a_newer_column_is_still_read(tmp_path):
    path = write_row(tmp_path, make_row())
    pd.read_parquet(path).drop(columns=["trace_model", "predictor_recall"]).to_parquet(path)
    (row,) = read_rows(tmp_path).to_dict("records")
    assert math.isnan(row["predictor_recall"])


# ---- parts -----------------------------------------------------------------------------------------------


def files_in(directory):
    return sorted(path.name[:5] for path in (directory / "rows").iterdir())


def write_many(directory, keys, **other):
    for place, key in enumerate(keys):
        write_row(directory, make_row(key=key, seed=place, requests=3, **other))


def test_rows_in_a_part_are_the_same_rows(tmp_path):
    write_many(tmp_path, "dbca")
    before = read_rows(tmp_path)
    assert compact(tmp_path) == 4
    assert files_in(tmp_path) == ["part-"]
    pd.testing.assert_frame_equal(read_rows(tmp_path), before, check_exact=True)
    assert list(read_rows(tmp_path, ["d", "a"])["key"]) == ["d", "a"]
    assert (has(tmp_path, "a"), has(tmp_path, "e"), stored_keys(tmp_path)) == (True, False, set("abcd"))
    with pytest.raises(InputError, match="1 of 2 results are not stored, the first is e"):
        read_rows(tmp_path, ["a", "e"])


def test_a_part_grows_until_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr("sim.store.PART_ROWS", 3)
    counts = []
    for keys in ("ab", "c", "d", "e"):
        write_many(tmp_path, keys)
        counts.append((compact(tmp_path), len(files_in(tmp_path))))
    assert counts == [(2, 1), (3, 1), (1, 2), (2, 2)]
    assert compact(tmp_path) == 0
    assert list(read_rows(tmp_path)["key"]) == list("abcde")


def test_a_kill_between_the_part_and_the_files_it_replaces_doubles_nothing(tmp_path, monkeypatch):
    write_many(tmp_path, "abc")
    before = read_rows(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sim.store._flush", lambda part: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compact(tmp_path)
    assert len(files_in(tmp_path)) == 4
    pd.testing.assert_frame_equal(read_rows(tmp_path), before, check_exact=True)
    assert compact(tmp_path) == 3
    pd.testing.assert_frame_equal(read_rows(tmp_path), before, check_exact=True)
    assert files_in(tmp_path) == ["part-"]


def test_readers_beside_writers_and_compactions_never_miss_a_row(tmp_path):
    keys = [f"{place:03}" for place in range(60)]
    written, faults = [], []

    def write():
        for key in keys:
            write_row(tmp_path, make_row(key=key, requests=3))
            written.append(key)

    def tidy():
        while writer.is_alive():
            compact(tmp_path)

    def read():
        while writer.is_alive():
            sure = set(written)
            if sure and not (sure <= set(read_rows(tmp_path, columns=["key"])["key"]) and sure <= stored_keys(tmp_path)):
                faults.append(sure)

    writer = threading.Thread(target=write)
    others = [threading.Thread(target=work) for work in (tidy, tidy, read, read)]
    for thread in (writer, *others):
        thread.start()
    for thread in (writer, *others):
        thread.join()
    assert faults == []
    assert list(read_rows(tmp_path)["key"]) == keys


def test_a_damaged_file_is_not_moved_into_a_part(tmp_path):
    write_many(tmp_path, "abc")
    cut_short(tmp_path / "rows" / "b.parquet")
    assert compact(tmp_path) == 2
    assert files_in(tmp_path) == ["b.par", "part-"]
    assert list(read_rows(tmp_path, ["a", "c"])["key"]) == ["a", "c"]
    with pytest.raises(InputError, match=r"b\.parquet: not a whole Parquet file"):
        read_rows(tmp_path)


def test_a_damaged_part_is_named(tmp_path):
    write_many(tmp_path, "abc")
    compact(tmp_path)
    (part,) = (tmp_path / "rows").iterdir()
    cut_short(part)
    for use in (read_rows, stored_keys):
        with pytest.raises(InputError, match=f"^{re.escape(str(part))}: not a whole Parquet file"):
            use(tmp_path)


def test_what_killed_writers_left_goes_after_an_hour(tmp_path):
    write_many(tmp_path, "ab")
    old, new = (tmp_path / "rows" / f".{name}.parquet.0.tmp" for name in ("old", "new"))
    for path, age in ((old, 7200), (new, 60)):
        path.write_bytes(b"PAR1")
        os.utime(path, (time.time() - age, time.time() - age))
    compact(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("parts", [False, True])
def test_only_what_is_asked_for_is_read(tmp_path, parts):
    for row in make_rows(requests=3):
        write_row(tmp_path, row)
    whole = read_rows(tmp_path)
    if parts:
        compact(tmp_path)
    found = read_rows(tmp_path, columns=["system", "tokens_per_s"], where={"budget": 0.25, "system": ["fate", "lru"]})
    expected = whole[(whole["budget"] == 0.25) & whole["system"].isin(["fate", "lru"])]
    pd.testing.assert_frame_equal(found, expected[["system", "tokens_per_s"]].reset_index(drop=True), check_exact=True)
    assert len(read_rows(tmp_path, where={"system": "nobody"})) == 0
    with pytest.raises(InputError, match="'sistem' is not a column of the results: did you mean 'system'"):
        read_rows(tmp_path, columns=["sistem"])


def test_columns_that_nobody_declared_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="does not know the type of the columns colour"):
        write_row(tmp_path, make_row(colour="red"))
    with pytest.raises(ValueError, match="lacks the columns hits"):
        write_row(tmp_path, {name: value for name, value in make_row().items() if name != "hits"})


def test_a_key_cannot_leave_the_directory(tmp_path):
    with pytest.raises(ValueError, match="is no key"):
        has(tmp_path, "../secret")


def one_run():
    """Return the figures of three steps of one request: a prompt of two tokens, then two tokens."""
    experts = np.zeros((4, 1, 1), np.int8)
    trace = Trace(
        model=ModelSpec("tiny", layers=1, experts=2, top_k=1),
        provenance=Provenance("synthetic", "nothing", "a test"),
        domains=("",),
        experts=experts,
        weights=np.ones((4, 1, 1), np.float16),
        request=np.zeros(4, np.int32),
        position=np.arange(4, dtype=np.int32),
        step=np.array([0, 0, 1, 2], np.int32),
        phase=np.array([PREFILL, PREFILL, DECODE, DECODE], np.uint8),
    )
    zeros, some = np.zeros(3, np.int64), np.array([30, 10, 12], np.int64)
    run = Run(
        steps=StepTimes(some, zeros, zeros, np.ones(3, np.int64), zeros, zeros),
        end_ns=52,
        link_busy_ns=0,
        bytes_by_kind=dict.fromkeys(KINDS, 0),
        prefetches=0,
        cancelled=0,
        predicted=0,
        predicted_and_needed=0,
        needed_after_prediction=0,
        peak_slots=1,
    )
    return metrics(run, make_workload(trace))


def same(one, other):
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))
