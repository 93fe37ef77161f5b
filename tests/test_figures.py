"""Figures are files that say what they show, the same every time, and leave matplotlib as it was."""

import subprocess
import sys

import matplotlib as mpl
import pandas as pd
import pytest
from rows import make_row, make_rows, make_table

from sim.figures import budget_figure, ranking_figure, style

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to be looked into."""
    found = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, paths: found.append(figure) or save(figure, paths))
    return found


@pytest.mark.parametrize("draw", [ranking_figure, budget_figure])
def test_a_figure_is_one_png_of_the_same_bytes_every_time(tmp_path, draw):
    rows = make_table(budgets=(0.25, 0.5), noise=0.05)
    one, other = draw(rows, tmp_path / "deep" / "one.png"), draw(rows, tmp_path / "other.png")
    assert one == tmp_path / "deep" / "one.png"
    assert one.read_bytes()[:8] == PNG
    assert one.read_bytes() == other.read_bytes()
    assert [path.name for path in one.parent.iterdir()] == ["one.png"]


def test_drawing_neither_heeds_nor_changes_the_settings(tmp_path):
    rows = make_table(budgets=(0.25,))
    before = ranking_figure(rows, tmp_path / "before.png").read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert ranking_figure(rows, tmp_path / "after.png").read_bytes() == before
        assert (mpl.rcParams["font.size"], mpl.rcParams["axes.facecolor"]) == (30, "red")


def test_drawing_does_not_load_pyplot():
    done = subprocess.run([sys.executable, "-c", "import sim.figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"])
    assert done.returncode == 0


def test_the_bars_of_a_system_add_up_to_its_time_per_token(tmp_path, drawn):
    rows = make_table(budgets=(0.25,))
    ranking_figure(rows, tmp_path / "ranking.png")
    (axis,) = drawn[0].axes
    ends = {}
    for bar in axis.patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
    assert [ends[place] for place in sorted(ends)] == pytest.approx([46, 53.5, 63, 71, 11, 22.5, 32])
    assert [label.get_text() for label in axis.get_yticklabels()][:2] == ["fate", "moe-infinity"]
    assert [text.get_text() for text in axis.texts][:2] == ["21.7", "18.7"]


def test_only_ceilings_are_hatched(tmp_path, drawn):
    ranking_figure(make_table(budgets=(0.25,)), tmp_path / "ranking.png")
    (axis,) = drawn[0].axes
    assert [bar.get_hatch() is not None for bar in axis.patches] == ([False] * 4 + [True] * 3) * 3


def test_shared_ranks_are_marked(tmp_path, drawn):
    ranking_figure(pd.DataFrame([make_row("a"), make_row("b"), make_row("c", wait=90)]), tmp_path / "ranking.png")
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["14.1 =", "14.1 =", "9.9"]


@pytest.mark.parametrize("budgets", [1, 3])
def test_there_is_a_panel_per_budget_on_one_scale(tmp_path, drawn, budgets):
    ranking_figure(make_table(budgets=[0.1 * (place + 1) for place in range(budgets)]), tmp_path / "ranking.png")
    panels = [axis for axis in drawn[0].axes if axis.axison]
    assert len(panels) == budgets
    assert len({axis.get_xlim() for axis in panels}) == 1


def test_a_line_per_system_runs_over_the_budgets(tmp_path, drawn):
    rows = make_table(budgets=(0.5, 0.125, 0.25))
    budget_figure(rows, tmp_path / "budget.png")
    (axis,) = drawn[0].axes
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["fate", "moe-infinity", "lfu", "lru", "all_resident", "perfect_prefetch", "clairvoyant"]
    lines = dict(zip(names, axis.get_lines(), strict=True))
    assert list(lines["lru"].get_xdata()) == [12.5, 25, 50]
    assert list(lines["lru"].get_ydata()) == pytest.approx([1000 / 101, 1000 / 71, 1000 / 41])
    assert [name for name in names if lines[name].get_linestyle() == "-"] == names[:4]


def test_twenty_one_systems_and_five_ceilings_look_different(tmp_path, drawn):
    rows = [
        make_row(f"s{place}", wait=20 + place, budget=part, ceiling=place > 20) for place in range(26) for part in (0.2, 0.4)
    ]
    budget_figure(pd.DataFrame(rows), tmp_path / "budget.png")
    lines = drawn[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in lines}) == 26


def test_several_settings_have_panels_of_their_own(tmp_path, drawn):
    rows = pd.DataFrame(make_rows(budgets=(0.25,)) + make_rows(budgets=(0.25,), hardware="rtx3090"))
    ranking_figure(rows, tmp_path / "ranking.png")
    budget_figure(rows, tmp_path / "budget.png")
    for figure in drawn:
        titles = [axis.get_title(loc="left").replace("\n", " ") for axis in figure.axes]
        assert ["rtx3090" in title for title in titles] == [False, True]


@pytest.mark.parametrize("draw", [ranking_figure, budget_figure])
def test_synthetic_routing_is_said(tmp_path, drawn, draw):
    draw(make_table(budgets=(0.25,)), tmp_path / "recorded.png")
    draw(make_table(budgets=(0.25,), trace_kind="synthetic"), tmp_path / "synthetic.png")
    said = [["SYNTHETIC ROUTING" in text.get_text() for text in figure.texts] for figure in drawn]
    assert [any(texts) for texts in said] == [False, True]


@pytest.mark.parametrize("draw", [ranking_figure, budget_figure])
def test_no_text_covers_another_or_leaves_the_figure(tmp_path, drawn, draw):
    long = [
        make_row(f"a_system_with_a_long_name_{place}", wait=20 + place, budget=part)
        for place in range(15)
        for part in (0.1, 0.2, 0.3)
    ]
    rows = pd.DataFrame(long + make_rows(budgets=(0.1, 0.2, 0.3))).assign(trace_kind="synthetic", model="another-model")
    draw(rows, tmp_path / "figure.png")
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    texts = [*figure.texts, *([figure._suptitle] if figure._suptitle not in figure.texts else [])]
    for axis in figure.axes:
        if axis.axison:
            texts += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
            low, high = axis.get_xlim()
            texts += [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
            low, high = sorted(axis.get_ylim())
            texts += [label for label in axis.get_yticklabels() if low <= label.get_position()[1] <= high]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    for place, (text, box) in enumerate(boxes):
        assert (box.x0 >= 0, box.y0 >= 0, box.x1 <= figure.bbox.x1, box.y1 <= figure.bbox.y1) == (True,) * 4, text
        covered = [other for other, its in boxes[place + 1 :] if covers(box, its)]
        # The warning stands in the heading's first line, which is empty.
        assert [other for other in covered if not other.startswith("SYNTHETIC")] == [], text


def covers(one, other):
    """Whether two boxes share more than a pixel."""
    return min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
