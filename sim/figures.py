"""Figures of stored results, as PNG files.

Drawn on `Figure` objects under matplotlib's own defaults: a notebook's figures and settings are neither
touched nor do they matter. The same rows give the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sim.report import SETTING, SYNTHETIC, budget, ranked, setting, split, synthetic
from traces.atomic import write_atomically

DPI = 150

# Okabe and Ito's colours, which the colour-blind can tell apart; without their yellow, too pale for a line.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)
_PARTS = {
    "compute": (BLUE, "compute"),
    "host": (ORANGE, "waiting for the host"),
    "wait": (VERMILLION, "waiting for a transfer"),
}
"""What a bar stacks, from the axis outwards: first what no policy can shorten."""
_LINES = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ((0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 3)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
_CEILING_MARKERS = (".", "1", "2", "+", "x")
_GREY = "0.4"

_CHARACTERS_PER_INCH = 13.5


def ranking_figure(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw a panel per budget: a bar of ms per token for every system, and its tokens/s beside it.

    The fastest is on top; ceilings stand hatched and pale at the bottom; "=" after a figure means that the
    rank is shared (`ranked`). Several settings in `rows` (traces, hardware, ...) have panels of their own.
    Returns `path`.
    """
    tables = split(ranked(rows))
    across = min(len(tables), 2)
    down = -(-len(tables) // across)
    panel = 6.9
    height = down * (0.23 * max(len(table) for table in tables) + 1.25)
    with _default_settings():
        figure, axes = _panels(tables, (panel * across, height), (down, across), panel * across)
        slowest = _slowest(tables)
        for axis, table in zip(axes, tables, strict=False):
            _draw_bars(axis, table, slowest[tuple(table.iloc[0][SETTING])])
            above = f"{_heading(table, panel - 1.7)}\n" if len(slowest) > 1 else ""
            axis.set_title(above + budget(table), loc="left")
        for axis in axes[len(tables) :]:
            axis.set_axis_off()
        handles = [Patch(facecolor=colour, label=name) for colour, name in _PARTS.values()]
        if any(table["ceiling"].any() for table in tables):
            pale: dict[str, Any] = {"facecolor": "0.6", "edgecolor": "white", "hatch": "////", "linewidth": 0}
            handles.append(Patch(label="ceiling, no real system", **pale))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if across > 1 else 2)
        return _save(figure, Path(path))


def budget_figure(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw tokens/s against the budget: a line per system and a dashed grey one per ceiling.

    Several settings in `rows` have panels of their own. The axis of tokens/s is logarithmic where the fastest
    is more than 8 times as fast as the slowest. Returns `path`.
    """
    tables = split(ranked(rows))
    panels = _by_setting(tables)
    styles = _styles(tables)
    width, height = 9.0, max(4.6 * len(panels), 0.19 * len(styles) + 1.0)
    beside_the_legend = width - 1.5 - 0.08 * max(len(label) for label in styles)
    with _default_settings():
        figure, axes = _panels(tables, (width, height), (len(panels), 1), beside_the_legend)
        for axis, panel in zip(axes, panels, strict=True):
            points = pd.concat(panel)
            for label, style in styles.items():
                line = points[points["label"] == label].sort_values("budget")
                axis.plot(100 * line["budget"], line["tokens_per_s"], **style)
            _label_budget_axes(axis, points)
            if len(panels) > 1:
                axis.set_title(_heading(panel[0], beside_the_legend - 1), loc="left")
        handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
        return _save(figure, Path(path))


@contextmanager
def _default_settings() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "grid.color": "0.9",
                "grid.linewidth": 0.6,
                "hatch.linewidth": 1.2,
                "legend.frameon": False,
                "lines.linewidth": 1.5,
                "lines.markersize": 4.5,
            }
        )
        yield


def _panels(
    tables: Sequence[pd.DataFrame], inches: tuple[float, float], shape: tuple[int, int], room: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure under a heading that is at most `room` inches wide, and its panels row by row.

    `inches` is the width, and the height of the panels alone. The heading says what all panels share.
    """
    settings = _by_setting(tables)
    heading = _heading(settings[0][0], room) if len(settings) == 1 else ""
    warned = any(synthetic(table) for table in tables)
    lines = ["", *([""] if warned else []), heading]
    width, height = inches
    height += 0.35 + 0.19 * "\n".join(lines).count("\n")
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    # The layout makes room for one text only; its first line is left empty for the warning.
    text = "\n".join(lines[1:])
    if text:
        figure.suptitle(text, x=0.08 / width, ha="left", fontsize=9, linespacing=1.4)
    if warned:
        where = (0.08 / width, 1 - 0.05 / height)
        warning = f"{SYNTHETIC}: generated, not recorded"
        figure.text(*where, warning, va="top", fontsize=10.5, fontweight="bold", color=VERMILLION)
    return figure, list(figure.subplots(*shape, squeeze=False).ravel())


def _draw_bars(axis: Axes, table: pd.DataFrame, slowest: float) -> None:
    """Draw one table from the top down, with a gap before the ceilings; the axis ends beyond `slowest` ms."""
    ceiling = table["ceiling"].to_numpy(dtype=bool)
    places = np.arange(len(table)) + 0.6 * (ceiling & (~ceiling).any())
    ends = np.zeros(len(table))
    for part, (colour, _) in _PARTS.items():
        lengths = table[f"{part}_ms_per_token"].fillna(0).to_numpy(dtype=float)
        for bar, is_ceiling in zip(
            axis.barh(places, lengths, left=ends, height=0.74, color=colour, linewidth=0),
            ceiling,
            strict=True,
        ):
            if is_ceiling:
                bar.set(alpha=0.5, hatch="////", edgecolor="white")
        ends += lengths
    shared = table["rank"].str.startswith("=")
    for place, end, speed, is_shared, is_ceiling in zip(places, ends, table["tokens_per_s"], shared, ceiling, strict=True):
        text = f"{_short(speed)}{' =' if is_shared else ''}"
        colour = _GREY if is_ceiling else "black"
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(text, (end, place), fontsize=8, color=colour, **beside)
    axis.set_yticks(places, list(table["label"]))
    for label, is_ceiling in zip(axis.get_yticklabels(), ceiling, strict=True):
        label.set(color=_GREY if is_ceiling else "black", fontstyle="italic" if is_ceiling else "normal")
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_xlim(0, slowest * 1.13)  # room for the figures at the ends of the bars
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    equal = ", = where a rank is shared" if shared.any() else ""
    axis.set_xlabel(f"ms per token (beside the bars: tokens/s{equal})")


def _label_budget_axes(axis: Axes, points: pd.DataFrame) -> None:
    axis.set_xlabel("budget, % of all experts' bytes")
    axis.set_ylabel("tokens/s")
    axis.grid()
    axis.set_xlim(left=0)
    speeds = points["tokens_per_s"].dropna()
    if len(speeds) and speeds.max() > 8 * speeds.min() > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("tokens/s, logarithmic")
    else:
        axis.set_ylim(bottom=0)


def _styles(tables: Sequence[pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Return how the line of every label looks: fastest at the largest budget first, ceilings last."""
    rows = pd.concat(tables).sort_values("budget", ascending=False, kind="stable").drop_duplicates("label")
    styles: dict[str, dict[str, Any]] = {}
    for place, label in enumerate(rows.loc[~rows["ceiling"], "label"]):
        turn = place // len(_LINES)
        # Each turn through the colours has other markers, and every second one is hollow.
        colour = _LINES[place % len(_LINES)]
        styles[label] = {
            "color": colour,
            "marker": _MARKERS[(place + turn) % len(_MARKERS)],
            "markerfacecolor": "white" if turn % 2 else colour,
        }
    for place, label in enumerate(rows.loc[rows["ceiling"], "label"]):
        styles[label] = {
            "color": "0.5",
            "linestyle": _DASHES[place % len(_DASHES)],
            "marker": _CEILING_MARKERS[place % len(_CEILING_MARKERS)],
            "zorder": 1.5,
        }
    return styles


def _by_setting(tables: Sequence[pd.DataFrame]) -> list[list[pd.DataFrame]]:
    """Return the tables, those of one setting together."""
    return list(_grouped(tables).values())


def _grouped(tables: Sequence[pd.DataFrame]) -> dict[tuple[Any, ...], list[pd.DataFrame]]:
    found: dict[tuple[Any, ...], list[pd.DataFrame]] = {}
    for table in tables:
        found.setdefault(tuple(table.iloc[0][SETTING]), []).append(table)
    return found


def _slowest(tables: Sequence[pd.DataFrame]) -> dict[tuple[Any, ...], float]:
    """Return the longest bar of every setting, ms: all its budgets have one scale and can be compared."""
    return {
        key: max(float(pd.concat(panel)[[f"{part}_ms_per_token" for part in _PARTS]].sum(axis=1).max()), 1e-9)
        for key, panel in _grouped(tables).items()
    }


def _short(speed: float) -> str:
    return "-" if np.isnan(speed) else f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _heading(table: pd.DataFrame, inches: float) -> str:
    return "\n".join(textwrap.wrap(setting(table), int(inches * _CHARACTERS_PER_INCH), break_on_hyphens=False))


def _save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, at once, and without the date and version that would change its bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(path, content.getvalue())
    return path
