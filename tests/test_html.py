"""The report is one file that asks for nothing, and says first what a reader must know."""

import json
import os
import re
from html.parser import HTMLParser

import pytest
from rows import make_row, make_rows

from sim.cli import main
from sim.config import compose_config
from sim.figures import style
from sim.html import NAMES, Measured, Selected, caveats, select_rows, write_figures, write_report
from sim.store import compact, read_rows, write_row
from traces.errors import InputError

SUMMARY = {
    "cells": [{"name": "lru", "anchor": None, "measured_tpot_ns": 2e6, "simulated_tpot_ns": 3e6, "priced_tpot_ns": 2e6}],
    "mean_error": 0.5,
    "worst_error": 0.5,
    "hardware": "h100_executor",
    "kendall_tau": None,
}
MEASURED = [Measured("a_gpu", SUMMARY)]


class Page(HTMLParser):
    """What a browser would read of a page: its tags, what they refer to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.open, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "data", "action", "poster")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


@pytest.fixture(autouse=True, scope="module")
def coarse():
    """Draw few dots: what they show is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a store of four systems at two budgets, whose texts must not be taken for HTML."""
    folder = tmp_path_factory.mktemp("html")
    config = compose_config("simulate", ["trace=none/such.safetensors"])
    for row in make_rows(budgets=(0.25, 0.5), note="<b>more</b> than the device has", trace="a & b"):
        if row["system"] in ("lru", "fate", "moe-infinity", "clairvoyant"):
            own = {**config, "system": {"name": row["system"]}, "budget": row["budget"]}
            write_row(folder / "results", {**row, "config": json.dumps(own)})
    return folder


@pytest.fixture(scope="module")
def written(folder):
    """The report of all of them."""
    return write_report(select_rows(folder / "results", {}), MEASURED, folder / "report.html")


def test_it_refers_to_nothing_outside_itself(written):
    text = written.read_text()
    page = Page(text)
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_it_holds_every_system_and_figure_that_the_rows_can_give(written):
    page = Page(written.read_text())
    for system in ("lru", "fate", "moe-infinity", "clairvoyant"):
        assert page.words.count(system) >= 2 + 1  # a table per budget, and what it is made of
    assert page.tags.count("img") == 5
    assert "Not drawn: a crossover needs results of one trace on two machines or more" in page.text
    assert "none/such.safetensors" in page.text  # whose routing is gone: no miss curve, no predictions
    assert "<b>more</b> than the device has" in page.text
    assert "a & b" in page.text


def test_the_same_rows_give_the_same_bytes(folder, written, tmp_path):
    again = write_report(select_rows(folder / "results", {}), MEASURED, tmp_path / "again.html")
    assert again.read_bytes() == written.read_bytes()


def test_synthetic_routing_is_said_before_all_else(tmp_path):
    config = json.dumps(compose_config("simulate"))
    rows = [make_row(requests=3, trace_kind="synthetic", config=config, model="another")]
    said = caveats(Selected(read(rows, tmp_path), 2), MEASURED)
    assert said[0].startswith("SYNTHETIC ROUTING: trace qwen3-30b-a3b_mixed was generated")
    assert "Against 1 runs measured on a_gpu and simulated on the profile h100_executor, measured" in said[1]
    assert "the simulated step was wrong by 50.0% on average" in said[1]
    assert said[2].startswith("Hardware h100_pcie5: 5 measured, 1 datasheet, 6 assumed; assumed: link.chunk_bytes")
    assert said[3:] == [
        "The routing is that of qwen3-30b-a3b; bytes and compute are those of another.",
        "1 results have fewer than 5 requests: no difference is claimed between them.",
        "2 results of older code are left out, since newer code has run the same.",
    ]
    assert "No measurement on a GPU" in caveats(Selected(read(rows, tmp_path), 0), [])[1]


def read(rows, folder):
    for row in rows:
        write_row(folder, row)
    return read_rows(folder)


def test_of_equal_runs_the_newest_is_reported(tmp_path):
    for age, key in enumerate(("old", "new")):
        path = write_row(tmp_path, make_row(key=key, config="{}", code_version=key))
        os.utime(path, (1000 + age, 1000 + age))
    write_row(tmp_path, make_row("fate", key="other", config='{"a": 1}'))
    for _ in ("as they were written", "in one part"):
        chosen = select_rows(tmp_path, {})
        assert (sorted(chosen.rows["key"]), chosen.left_out) == (["new", "other"], 1)
        compact(tmp_path)
    write_row(tmp_path, make_row(key="a-newer-one", config="{}"))
    assert sorted(select_rows(tmp_path, {}).rows["key"]) == ["a-newer-one", "other"]


def test_rows_are_selected_by_their_columns(tmp_path):
    read([make_row(name, config=json.dumps(name)) for name in ("lru", "fate")], tmp_path)
    assert list(select_rows(tmp_path, {"system": ["fate", "none"]}).rows["system"]) == ["fate"]
    for select, sentence in (
        ({"sistem": "lru"}, "select: there is no column 'sistem': did you mean 'system'"),
        ({"requests": 1}, "select: there is no column 'requests'"),
        ({"slots": "many"}, "slots is 'many', but that column holds int64"),
        ({"slots": 0.5}, "slots is 0.5, but that column holds int64"),
        ({"system": "none"}, "no stored result has {'system': 'none'}"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            select_rows(tmp_path, select)


def test_figures_are_written_as_png_and_pdf_or_refused_with_a_reason(folder, tmp_path):
    names = ("traffic", "crossover", "miss_curve", "prediction_by_layer", "validation")
    assert set(names) < set(NAMES)
    paths, refused = write_figures(names, select_rows(folder / "results", {}).rows, MEASURED, tmp_path)
    assert [path.name for path in paths] == ["traffic.png", "traffic.pdf", "validation.png", "validation.pdf"]
    assert [sentence.partition(":")[0] for sentence in refused] == ["crossover", "miss_curve", "prediction_by_layer"]


def test_figures_of_measured_cells_need_no_stored_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("real.validation.command.ground_truth", lambda: [("a_gpu", SUMMARY)])
    assert main(["report", "figure=validation", f"results={tmp_path / 'none'}", f"out={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / f"validation.{kind}") for kind in ("png", "pdf")]
    assert main(["report", "figure=host_time", f"results={tmp_path / 'none'}", f"out={tmp_path}"]) == 2
    assert "host_time: no measured cell says its host time per layer" in capsys.readouterr().err


def test_the_command(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["report", "figure=budget_curve", "select={system: [lru, fate]}"]) == 0
    assert capsys.readouterr().out == "results/figures/budget_curve.png\nresults/figures/budget_curve.pdf\n"
    assert main(["report", "results", "out=mine.html", "select.budget=0.5", "++select.system=[lru]"]) == 0
    assert capsys.readouterr().out == "mine.html\n"
    assert "budget 0.5 of all experts" in (folder / "mine.html").read_text()
    assert "budget 0.25 of all experts" not in (folder / "mine.html").read_text()


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ("figure=budget", "figure is 'budget': did you mean 'budget_curve'?"),
        ("figure=crossover", "crossover: a crossover needs results of one trace on two machines"),
        ("select.sistem=lru", "select: there is no column 'sistem': did you mean 'system'?"),
        ("select.system=sieve", "results: no stored result has {'system': 'sieve'}"),
        ("results=nowhere", "nowhere: no results"),
    ],
)
def test_bad_input_is_said_in_a_sentence(folder, monkeypatch, capsys, word, wrong):
    monkeypatch.chdir(folder)
    assert main(["report", word]) == 2
    assert wrong in capsys.readouterr().err
