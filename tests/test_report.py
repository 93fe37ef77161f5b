"""The ranking says what is real, what a ceiling is, and what the routing is."""

import io
import json
import math

import pandas as pd
import pytest
from rich.console import Console
from rows import CEILINGS, make_row, make_rows, make_table

from sim.report import print_ranking, ranked, ranking_dict, ranking_markdown, split
from traces.errors import InputError


def printed(rows, width=120, **settings):
    console = Console(file=io.StringIO(), width=width, **settings)
    print_ranking(console, rows)
    return console.file.getvalue()


def test_systems_are_sorted_by_speed_and_ceilings_stand_last():
    table = ranked(make_table(budgets=(0.25,)))
    assert list(table["system"]) == [
        "fate",
        "moe-infinity",
        "lfu",
        "lru",
        "all_resident",
        "perfect_prefetch",
        "clairvoyant",
    ]
    assert list(table["rank"]) == ["1", "2", "3", "4", "", "", ""]


def test_each_budget_is_a_table_from_small_to_large():
    tables = split(ranked(make_table(budgets=(0.5, 0.125))))
    assert [(table["budget"].iloc[0], len(table)) for table in tables] == [(0.125, 7), (0.5, 7)]


def test_each_setting_is_a_table():
    rows = make_rows(budgets=(0.25,)) + make_rows(budgets=(0.25,), hardware="rtx3090")
    assert [table["hardware"].iloc[0] for table in split(ranked(pd.DataFrame(rows)))] == [
        "h100_pcie",
        "rtx3090",
    ]


def test_systems_that_cannot_be_told_apart_share_the_rank_of_the_fastest():
    rows = [
        make_row("a", wait=30),
        make_row("b", wait=30.5, noise=0.2),
        make_row("c", wait=31, noise=0.2),
        make_row("d", wait=60),
        make_row("e", wait=60),
        make_row("f", wait=90),
    ]
    table = ranked(pd.DataFrame(rows)).set_index("system")
    assert dict(table["rank"]) == {"a": "=1", "b": "=1", "c": "=1", "d": "=4", "e": "=4", "f": "6"}


def test_too_few_requests_leave_every_rank_in_doubt():
    table = ranked(pd.DataFrame([make_row("a", wait=30, requests=4), make_row("lru", requests=4)]))
    assert list(table["rank"]) == ["1?", "2?"]
    assert list(table["speed_vs_lru_is_real"]) == [None, None]
    assert "1.73x ?" in printed(table)
    assert "?  not claimed: fewer than 5 requests" in printed(table)
    assert "=  cannot" not in printed(table)


def test_speed_is_a_multiple_of_lru_in_the_same_table():
    table = ranked(make_table(budgets=(0.25, 0.5))).set_index(["budget", "system"])
    assert table.loc[(0.25, "clairvoyant"), "speed_vs_lru"] == pytest.approx(71 / 32)
    assert table.loc[(0.5, "clairvoyant"), "speed_vs_lru"] == pytest.approx(41 / 21.5)
    assert table.loc[(0.5, "lru"), ["speed_vs_lru", "speed_vs_lru_is_real"]].tolist() == [1.0, False]


def test_the_distance_to_the_best_is_the_share_of_the_clairvoyant_s_speed():
    table = ranked(make_table(budgets=(0.25,))).set_index("system")
    assert table.loc["lru", "share_of_clairvoyant"] == pytest.approx(32 / 71)
    assert table.loc["clairvoyant", "share_of_clairvoyant"] == 1


def test_without_lru_and_clairvoyant_nothing_is_compared():
    table = ranked(pd.DataFrame([make_row("a"), make_row("b")]))
    assert table[["speed_vs_lru", "share_of_clairvoyant"]].isna().all(axis=None)
    assert "speed against" not in printed(table)


def test_what_limits_a_system_is_where_most_of_its_time_goes():
    table = ranked(make_table(budgets=(0.25,))).set_index("system")
    assert (table.loc["lru", "limited_by"], table.loc["all_resident", "limited_by"]) == ("wait", "compute")


def test_rows_of_one_system_are_told_apart_by_what_differs():
    rows = [make_row("lru", seed=0), make_row("lru", seed=1), make_row("fate", wait=3)]
    assert sorted(ranked(pd.DataFrame(rows))["label"]) == ["fate", "lru seed 0", "lru seed 1"]
    rows = [make_row("lru", key="a" * 64), make_row("lru", key="b" * 64)]
    assert sorted(ranked(pd.DataFrame(rows))["label"]) == ["lru aaaaaaaa", "lru bbbbbbbb"]


def test_a_row_is_compared_with_the_lru_of_its_own_seed():
    rows = [make_row(name, wait=wait, seed=seed, noise=0.3) for name, wait in (("lru", 60), ("a", 30)) for seed in (0, 1)]
    table = ranked(pd.DataFrame(rows)).set_index(["system", "seed"])
    for seed in (0, 1):
        speeds = table.loc[("a", seed), "tokens_per_s"] / table.loc[("lru", seed), "tokens_per_s"]
        assert table.loc[("a", seed), "speed_vs_lru"] == pytest.approx(speeds)


def test_runs_of_a_trace_that_was_cut_short_are_a_table_of_their_own():
    rows = [make_row("lru"), make_row("fate", wait=33), make_row("lru", requests=9, key="short")]
    assert [len(table) for table in split(ranked(pd.DataFrame(rows)))] == [2, 1]


def test_rows_of_different_requests_are_refused():
    with pytest.raises(InputError, match="cannot be compared"):
        ranked(pd.DataFrame([make_row("lru"), make_row("fate", requests=9, tokens=1512)]))


def test_nothing_to_rank_is_said():
    with pytest.raises(InputError, match="no results to rank"):
        ranked(make_table().iloc[:0])


def test_the_caller_s_rows_are_left_alone():
    rows = make_table().drop(columns="trace_model")
    columns = list(rows.columns)
    ranked(rows)
    assert list(rows.columns) == columns


def test_a_full_table_fits_120_columns_in_one_piece():
    text = printed(make_table(budgets=(0.25,), noise=0.05, prefill=True))
    (header,) = [line for line in text.splitlines() if "tok/s" in line and "system" in line]
    assert header.split() == [
        *("system", "tok/s", "p50", "p95", "TTFT", "compute", "wait", "host", "hit", "late", "miss"),
        *("demand", "useful", "late", "wasted", "%", "lru"),
    ]
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_table_s_figures_are_those_of_the_rows():
    """Exact figures: 12 requests that all run at the same speed."""
    lines = printed(make_table(budgets=(0.25,))).splitlines()
    assert lines[1:3] == [
        "budget 0.25 of all experts (14.2 GB, 1,536 slots)",
        "trace qwen3-30b-a3b_mixed: 1,512 tokens of 12 requests, one_request; qwen3-30b-a3b on h100_pcie "
        "(1 measured, 1 assumed)",
    ]
    assert [" ".join(line.split()) for line in lines[6:14]] == [
        "1 fate 21.7 44.2 60.3 9.0 33.0* 4.0 59.1 7.9 33.0 239 574 287 191 70 1.54x 1.54-1.54",
        "2 moe-infinity 18.7 51.4 70.1 9.0 41.0* 3.5 52.9 6.1 41.0 743 446 223 149 60 1.33x 1.33-1.33",
        "3 lfu 15.9 60.5 82.5 9.0 52.0* 2.0 48.0 0 52.0 1884 0 0 0 51 1.13x 1.13-1.13",
        "4 lru 14.1 68.2 93.0 9.0 60.0* 2.0 40.0 0 60.0 2174 0 0 0 45 1",
        "ceilings:",
        "all_resident 90.9 10.6 14.4 9.0* 0.0 2.0 100 0 0 0 0 0 0 291 6.45x 6.45-6.45",
        "perfect_prefetch 44.4 21.6 29.5 9.0 11.0* 2.5 85.7 3.3 11.0 0 239 120 80 142 3.16x 3.16-3.16",
        "clairvoyant 31.2 30.7 41.9 9.0 21.0* 2.0 79.0 0 21.0 761 0 0 0 100 2.22x 2.22-2.22",
    ]


@pytest.mark.parametrize("width", [20, 40, 80, 100, 200])
def test_no_width_loses_a_column_or_overflows(width):
    text = printed(make_table(budgets=(0.25,), prefill=True, gate_mass_skipped=0.01), width)
    assert max(len(line) for line in text.splitlines()) <= width
    if width >= 80:
        words = text.split()
        assert {"tok/s", "compute", "miss", "wasted", "lru", "skipped"} <= set(words)


def test_a_pipe_gets_neither_colours_nor_characters_beyond_its_encoding():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=120)
    print_ranking(console, make_table())
    console.file.flush()
    assert b"\x1b" not in console.file.buffer.getvalue()


def test_names_are_no_markup():
    assert "a[red]b" in printed(pd.DataFrame([make_row("a[red]b")]))


def test_columns_without_a_figure_are_left_out_and_quality_is_shown_where_it_was_paid():
    plain = printed(pd.DataFrame([make_row("lru"), make_row("lfu", wait=50)]))
    assert "TTFT " not in plain.split("tok/s  ")[0]
    assert "wasted" not in plain.split("tok/s  ")[0]
    assert "gate mass" not in plain
    paid = printed(pd.DataFrame([make_row("lru"), make_row("adapmoe", wait=5, gate_mass_skipped=0.031)]))
    assert "gate mass %" in paid
    assert " 3.1" in paid


def test_a_difference_that_is_not_real_is_n_s():
    rows = [make_row("lru", noise=0.2), make_row("lfu", wait=59.5, noise=0.2)]
    assert "n.s. 0." in printed(pd.DataFrame(rows))


def test_a_small_real_difference_does_not_read_as_none():
    assert "1.007x 1.007-1.007" in printed(pd.DataFrame([make_row("lru"), make_row("lfu", wait=59.5)]))


def test_notes_stand_below_the_table():
    one = printed(pd.DataFrame([make_row("lru", note="ran in waves"), make_row("lfu")]))
    assert "lru: ran in waves" in one
    both = printed(pd.DataFrame([make_row("lru", note="ran in waves"), make_row("lfu", note="ran in waves")]))
    assert both.count("ran in waves") == 1
    assert "caution: ran in waves" in both


@pytest.mark.parametrize("show", [printed, ranking_markdown, lambda rows: ranking_dict(rows)["tables"][0]["title"][0]])
def test_synthetic_routing_is_said_first(show):
    rows = make_table(budgets=(0.25,))
    assert "SYNTHETIC ROUTING" not in show(rows)
    assert show(rows.assign(trace_kind="synthetic")).strip(" *\n").startswith("SYNTHETIC ROUTING: budget")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({}, "; qwen3-30b-a3b on h100_pcie"),
        ({"model": "mixtral"}, "; routing of qwen3-30b-a3b priced with the bytes of mixtral on"),
        ({"model": "mixtral", "trace_model": None}, "; priced with the bytes of mixtral on"),
        ({"trace_kind": "imported"}, "trace qwen3-30b-a3b_mixed (imported): "),
        ({"config": "{}"}, "on h100_pcie\n"),
        ({"config": "not JSON"}, "on h100_pcie\n"),
    ],
)
def test_the_title_says_whose_routing_and_whose_bytes(names, says):
    assert says in printed(make_table(budgets=(0.25,), **names), 200)


def test_markdown_has_a_table_per_budget_with_ceilings_in_italics():
    text = ranking_markdown(make_table(budgets=(0.125, 0.25)))
    lines = text.splitlines()
    assert sum(line.startswith("| ---") for line in lines) == 2
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}
    assert sum(f"| *{name}* |" in line for line in lines for name in CEILINGS) == 6
    assert "| 1 | fate | 21.7 / 44.2 / 60.3 | 9.0 / 33.0\\* / 4.0 | 59.1 / 7.9 / 33.0 |" in text


def test_the_json_form_is_json_and_whole():
    found = ranking_dict(make_table(budgets=(0.25,)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (table,) = found["tables"]
    assert (table["budget"], table["tokens"], len(table["systems"])) == (0.25, 1512, 7)
    first = table["systems"][0]
    assert (first["system"], first["rank"], first["ttft_ms_mean"]) == ("fate", "1", None)
    assert math.isclose(first["speed_vs_lru"], 71 / 46)
    assert "request_ns" not in first
