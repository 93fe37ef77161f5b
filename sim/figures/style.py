"""The one style of all figures: colours, fonts, headings, and how they are saved.

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

from sim.report import SETTING, SYNTHETIC, setting, synthetic
from traces.atomic import write_atomically
from traces.errors import InputError

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
GREY = "0.4"
"""Of ceilings, and of what is said in passing."""

PARTS = {
    "compute": (BLUE, "compute"),
    "host": (ORANGE, "waiting for the host"),
    "wait": (VERMILLION, "waiting for a transfer"),
}
"""What the time of a token consists of, from the axis outwards: first what no policy can shorten."""

_LINES = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ((0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 3)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
_CEILING_MARKERS = (".", "1", "2", "+", "x")

_CHARACTERS_PER_INCH = 13.5


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the project, and leave matplotlib's settings as they were."""
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
                "pdf.fonttype": 42,  # text stays text
            }
        )
        yield


def panels(
    tables: Sequence[pd.DataFrame], inches: tuple[float, float], shape: tuple[int, int], room: float, **axes: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure under a heading that is at most `room` inches wide, and its panels row by row.

    `inches` is the width, and the height of the panels alone. The heading says what all `tables` share, and before it
    that routing is synthetic. `axes` goes to ``Figure.subplots``.
    """
    settings = by_setting(tables)
    text = heading(settings[0][0], room) if len(settings) == 1 else ""
    warned = any(synthetic(table) for table in tables)
    lines = ["", *([""] if warned else []), text]
    width, height = inches
    height += 0.35 + 0.19 * "\n".join(lines).count("\n")
    figure = blank((width, height))
    # The layout makes room for one text only; its first line is left empty for the warning.
    text = "\n".join(lines[1:])
    if text:
        figure.suptitle(text, x=0.08 / width, ha="left", fontsize=9, linespacing=1.4)
    if warned:
        where = (0.08 / width, 1 - 0.05 / height)
        warning = f"{SYNTHETIC}: generated, not recorded"
        figure.text(*where, warning, va="top", fontsize=10.5, fontweight="bold", color=VERMILLION)
    return figure, list(figure.subplots(*shape, squeeze=False, **axes).ravel())


def blank(inches: tuple[float, float]) -> Figure:
    """Return an empty figure that belongs to nobody's pyplot."""
    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def line_styles(tables: Sequence[pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Return how the line of every label looks: fastest at the largest budget first, ceilings last."""
    rows = pd.concat(tables).sort_values("budget", ascending=False, kind="stable").drop_duplicates("label")
    styles = {label: solid(place) for place, label in enumerate(rows.loc[~rows["ceiling"], "label"])}
    return styles | {label: dashed(place) for place, label in enumerate(rows.loc[rows["ceiling"], "label"])}


def solid(place: int) -> dict[str, Any]:
    """Return the look of the line of the system at `place`."""
    turn = place // len(_LINES)
    # Each turn through the colours has other markers, and every second one is hollow.
    colour = _LINES[place % len(_LINES)]
    return {
        "color": colour,
        "marker": _MARKERS[(place + turn) % len(_MARKERS)],
        "markerfacecolor": "white" if turn % 2 else colour,
    }


def dashed(place: int) -> dict[str, Any]:
    """Return the look of the line of the ceiling at `place`."""
    return {
        "color": "0.5",
        "linestyle": _DASHES[place % len(_DASHES)],
        "marker": _CEILING_MARKERS[place % len(_CEILING_MARKERS)],
        "zorder": 1.5,
    }


def by_setting(tables: Sequence[pd.DataFrame]) -> list[list[pd.DataFrame]]:
    """Return the tables, those of one setting together."""
    found: dict[tuple[Any, ...], list[pd.DataFrame]] = {}
    for table in tables:
        found.setdefault(setting_of(table), []).append(table)
    return list(found.values())


def setting_of(table: pd.DataFrame) -> tuple[Any, ...]:
    """Return what the rows of a table share."""
    return tuple(table.iloc[0][SETTING])


def heading(table: pd.DataFrame, inches: float) -> str:
    """Return what the rows of a table share as text, in lines of at most `inches`."""
    return wrapped(setting(table), inches)


def wrapped(text: str, inches: float) -> str:
    """Return `text` in lines of at most `inches`."""
    return "\n".join(textwrap.wrap(text, int(inches * _CHARACTERS_PER_INCH), break_on_hyphens=False))


def short(number: float) -> str:
    """Return a figure to stand beside a bar."""
    return "-" if np.isnan(number) else f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def save(figure: Figure, paths: Sequence[str | Path]) -> Path:
    """Write the figure to every path, as its ending says (.png, .pdf, .svg), at once; return the first path.

    Date and version, which would change the bytes, are left out. Raises InputError for another ending.
    """
    for path in map(Path, paths):
        kind = path.suffix.lower().removeprefix(".")
        if kind not in _WITHOUT_DATE:
            raise InputError(f"{path}: a figure ends in {', '.join(f'.{kind}' for kind in _WITHOUT_DATE)}")
    for path in map(Path, paths):
        kind = path.suffix.lower().removeprefix(".")
        content = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(content, format=kind, dpi=DPI, metadata=_WITHOUT_DATE[kind])
        write_atomically(path, content.getvalue())
    return Path(paths[0])


_WITHOUT_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
"""Kinds of files, with what is left out of each."""
