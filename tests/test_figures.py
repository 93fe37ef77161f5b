"""Figures are files that say what they show, the same every time, and leave matplotlib as it was."""

import json
import subprocess
import sys

import matplotlib as mpl
import pandas as pd
import pytest
from builders import make_trace
from rows import make_row, make_rows, make_table

from sim.config import compose_config
from sim.experiment import costs_of, simulate, system_of, workload_of
from sim.figures import (
    agreement_figure,
    budget_figure,
    crossover_figure,
    host_figure,
    miss_figure,
    prediction_figure,
    ranking_figure,
    style,
    time_figure,
    traffic_figure,
)
from sim.predictions import predictions_by_layer
from sim.store import read_rows
from traces import save_trace
from traces.errors import InputError

OF_ROWS = [ranking_figure, budget_figure, time_figure, traffic_figure]
"""Figures that need nothing but rows."""

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Draw few dots: what they show is the same."""
    monkeypatch.setattr(style, "DPI", 40)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to be looked into."""
    found = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, paths: found.append(figure) or save(figure, paths))
    return found


@pytest.mark.parametrize("draw", OF_ROWS)
def test_a_figure_is_one_png_of_the_same_bytes_every_time(tmp_path, draw):
    rows = make_table(budgets=(0.25, 0.5), noise=0.05)
    one, other = draw(rows, tmp_path / "deep" / "one.png"), draw(rows, tmp_path / "other.png")
    assert one == tmp_path / "deep" / "one.png"
    assert one.read_bytes()[:8] == PNG
    assert one.read_bytes() == other.read_bytes()
    assert [path.name for path in one.parent.iterdir()] == ["one.png"]


def test_a_figure_is_written_to_every_path_and_never_with_a_date(tmp_path):
    rows = make_table(budgets=(0.25,))
    for folder in ("one", "two"):
        first = ranking_figure(rows, *(tmp_path / folder / f"ranking.{kind}" for kind in ("png", "pdf", "svg")))
        assert first == tmp_path / folder / "ranking.png"
    for kind, start in (("png", PNG), ("pdf", b"%PDF-"), ("svg", b"<?xml")):
        one, two = ((tmp_path / folder / f"ranking.{kind}").read_bytes() for folder in ("one", "two"))
        assert one == two
        assert one.startswith(start)
    with pytest.raises(InputError, match=r"ranking.jpg: a figure ends in .png, .pdf, .svg"):
        ranking_figure(rows, tmp_path / "ranking.png", tmp_path / "ranking.jpg")


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


def test_the_line_across_a_bar_is_the_interval_against_lru(tmp_path, drawn):
    rows = pd.DataFrame([make_row("lru"), make_row("quick", wait=30, noise=0.1), make_row("few", requests=3)])
    ranking_figure(rows[:2], tmp_path / "ranking.png")
    (axis,) = drawn[0].axes
    (low, high), lru = [[x for x, _ in line] for line in axis.collections[0].get_segments()]
    times = rows[[f"{part}_ms_per_token" for part in ("compute", "wait", "host")]].sum(axis=1)
    assert low < times[1] < high < times[0]
    assert lru == []
    ranking_figure(rows[2:], tmp_path / "few.png")
    assert not any(text.get_text().startswith("95 %") for text in drawn[1].legends[0].get_texts())


def test_bars_of_traffic_add_up_to_what_is_moved(tmp_path, drawn):
    rows = make_table(budgets=(0.25,))
    traffic_figure(rows, tmp_path / "traffic.png")
    (axis,) = drawn[0].axes
    ends = {}
    for bar in axis.patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
    order = [label.get_text() for label in axis.get_yticklabels()]
    moved = rows.set_index("system")["moved_mb_per_token"]
    assert [ends[place] for place in sorted(ends)] == pytest.approx([moved[name] for name in order])


def test_every_system_has_a_panel_of_its_time_by_budget(tmp_path, drawn):
    time_figure(make_table(budgets=(0.25, 0.5)), tmp_path / "time.png")
    panels = [axis for axis in drawn[0].axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in panels][:4] == ["fate", "moe-infinity", "lfu", "lru"]
    heights = [bar.get_y() + bar.get_height() for bar in panels[3].patches[-2:]]
    assert heights == pytest.approx([71, 41])


def test_the_crossover_names_the_winner_of_every_field(tmp_path, drawn):
    rows = pd.DataFrame(
        [
            make_row(system, wait=wait, budget=budget, hardware=hardware, config=compose_hardware(hardware))
            for hardware, waits in (("rtx3090_pcie4", (60, 50)), ("h100_pcie5", (20, 30)))
            for system, wait in zip(("lru", "fate"), waits, strict=True)
            for budget in (0.25, 0.5)
        ]
    )
    crossover_figure(rows, tmp_path / "crossover.png")
    (axis,) = drawn[0].axes
    (image,) = axis.get_images()
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    found = [[names[int(place)] for place in line] for line in image.get_array()]
    assert found == [["fate", "lru"], ["fate", "lru"]]  # the slower link is on the left
    assert [label.get_text().split("\n")[1] for label in axis.get_xticklabels()] == ["rtx3090", "h100"]
    assert sorted(text.get_text() for text in axis.texts) == ["1.00x"] * 2 + ["1.16x"] * 2
    with pytest.raises(InputError, match="two machines or more"):
        crossover_figure(rows[rows["hardware"] == "h100_pcie5"], tmp_path / "one.png")


def test_a_link_that_was_set_has_the_bandwidth_that_it_was_set_to(tmp_path, drawn):
    words = [[f"link_gb_per_s={speed}"] for speed in (200, 3)] + [[]]
    configs = [compose_config("simulate", ["hardware=h100_pcie5", *word]) for word in words]
    rows = [make_row(hardware=config["hardware"]["name"], config=json.dumps(config)) for config in configs]
    crossover_figure(pd.DataFrame(rows), tmp_path / "crossover.png")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["3", "47.9", "200"]
    assert "on h100_pcie5" in axis.get_title(loc="left").replace("\n", " ")


def compose_hardware(name):
    return json.dumps({"hardware": compose_config("simulate", [f"hardware={name}"])["hardware"]})


def ranking(routed):
    return [*routed, *(expert for expert in range(6) if expert not in routed)][:4]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Rows of three systems on a trace in which the router repeats itself, foretold perfectly by its lookahead."""
    folder = tmp_path_factory.mktemp("simulated")
    experts = [[[(t * (layer + 1)) % 5, (t + 3 + layer) % 6] for layer in range(3)] for t in range(24)]
    experts = [[[a, b if a != b else (b + 1) % 6] for a, b in token] for token in experts]
    # Of the last layer there is none to look ahead to.
    ahead = [[[ranking(token[layer + 1]) if layer < 2 else [-1] * 4] for layer in range(3)] for token in experts]
    save_trace(make_trace(experts, lookahead=ahead, requests=[t // 4 for t in range(24)]), folder / "tiny.safetensors")
    for system in ("lru", "lfu", "next_gate"):
        overrides = [f"trace={folder / 'tiny.safetensors'}", "model=trace", "budget=0.5", "engine=reference"]
        simulate(compose_config("simulate", [*overrides, f"system={system}", f"results={folder}"]))
    return read_rows(folder)


def test_predictions_by_layer_add_up_to_the_engines(tmp_path, drawn, simulated):
    prediction_figure(simulated, tmp_path / "prediction.png")
    precision, recall = drawn[0].axes
    assert [len(axis.get_lines()) for axis in (precision, recall)] == [1, 1]
    (row,) = [row for row in simulated.to_dict("records") if row["system"] == "next_gate"]
    config = json.loads(row["config"])
    workload = workload_of(config)
    found = predictions_by_layer(system_of(config, workload, costs_of(config, workload)[0]), workload)
    assert found.predicted_and_needed.sum() / found.predicted.sum() == row["predictor_precision"]
    assert found.predicted[0] == 0  # nothing is foretold across steps
    shares = found.predicted_and_needed[1:] / found.predicted[1:]
    assert list(precision.get_lines()[0].get_ydata())[1:] == pytest.approx(list(100 * shares))
    with pytest.raises(InputError, match="next_gate: its predictions have a precision"):
        prediction_figure(simulated.assign(predictor_precision=simulated["predictor_precision"] / 2), tmp_path / "other.png")
    with pytest.raises(InputError, match="no stored result is of a system that predicts"):
        prediction_figure(simulated[simulated["system"] == "lru"], tmp_path / "none.png")


def test_miss_curves_end_at_what_must_be_loaded_once(tmp_path, drawn, simulated):
    miss_figure(simulated, tmp_path / "miss.png")
    (axis,) = drawn[0].axes
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(names) == ["Belady", "LFU", "LRU"]
    lines = dict(zip(names, (line.get_ydata() for line in axis.get_lines()), strict=True))
    workload = workload_of(json.loads(simulated.iloc[0]["config"]))
    once = 100 * len(set(workload.events.keys.tolist())) / len(workload.events.keys)
    assert [line[-1] for line in lines.values()] == pytest.approx([once] * 3)
    assert all((lines["Belady"] <= lines[name]).all() for name in ("LRU", "LFU"))


def test_the_validation_figure_shows_every_cell(tmp_path, drawn):
    cells = [
        {"name": name, "anchor": anchor, "measured_tpot_ns": 2e6, "simulated_tpot_ns": 3e6, "priced_tpot_ns": 2.5e6}
        for name, anchor in (("all resident", "all resident"), ("lru", None), ("fate", None))
    ]
    agreement_figure(cells, "a machine", tmp_path / "validation.png")
    _, right = drawn[0].axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["lru", "fate", "all resident"]
    assert right.get_title(loc="left") == "error of a step: mean 50.0%, worst 50.0%"
    assert list(right.get_lines()[-2].get_xdata()) == [0.25] * 3


def test_the_host_figure_stacks_what_a_layer_consists_of(tmp_path, drawn):
    def spread(median):
        return {"median": median, "p10": 0.5 * median, "p90": 2.0 * median}

    parts = {"issue_gate": 5e3, "look_ahead": 2e3, "await_gate": 80e3, "decide_and_feed": 20e3, "issue_experts": 3e4}
    parts |= {"between_layers": 1e3}
    host = {name: spread(ns) for name, ns in parts.items()}
    cells = [
        {"name": "lru", "anchor": None, "host_per_layer_ns": host},
        {"name": "of older code", "anchor": None, "host_per_layer_ns": None},
        {"name": "all resident", "anchor": "all resident", "host_per_layer_ns": host},
    ]
    host_figure(cells, "a machine", tmp_path / "host.png")
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["lru", "all resident"]
    assert [bar.get_x() for bar in left.patches] == [0, 0, 5, 5, 7, 7, 27, 27, 57, 57]
    assert [bar.get_width() for bar in left.patches] == [5, 5, 2, 2, 20, 20, 30, 30, 1, 1]
    assert [bar.get_width() for bar in right.patches] == [80, 80]
    assert right.collections[0].get_segments()[0][:, 0].tolist() == [40, 160]
    with pytest.raises(InputError, match="no measured cell says its host time per layer"):
        host_figure(cells[1:2], "a machine", tmp_path / "none.png")


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


@pytest.mark.parametrize("draw", OF_ROWS)
def test_synthetic_routing_is_said(tmp_path, drawn, draw):
    draw(make_table(budgets=(0.25,)), tmp_path / "recorded.png")
    draw(make_table(budgets=(0.25,), trace_kind="synthetic"), tmp_path / "synthetic.png")
    said = [["SYNTHETIC ROUTING" in text.get_text() for text in figure.texts] for figure in drawn]
    assert [any(texts) for texts in said] == [False, True]


@pytest.mark.parametrize("draw", OF_ROWS)
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
