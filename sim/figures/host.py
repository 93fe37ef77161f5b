"""The figure of the host thread: what it does in a layer, part by part, and how long it waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sim.figures import style
from sim.figures.style import BLUE, GREEN, ORANGE, PURPLE, SKY
from traces.errors import InputError

_WORK = {
    "issue_gate": (BLUE, "issue attention and gate"),
    "look_ahead": (SKY, "issue shared experts, look ahead"),
    "decide_and_feed": (ORANGE, "decide, start a demand if the link is idle"),
    "issue_experts": (GREEN, "issue experts, other demands, look ahead"),
    "between_layers": (PURPLE, "between layers"),
}
_WAIT = {"await_gate": ("0.7", "wait for the gate's result: no work")}


def host_figure(cells: Sequence[Mapping[str, Any]], machine: str, *paths: str | Path) -> Path:
    """Draw for every measured cell what the host thread's time per layer consists of, and beside it how long it waits.

    `cells` are those of a ``summary.json`` (docs/validation.md), measured on `machine`; bars are medians over layers and
    timed steps, lines reach from the 10th to the 90th percentile of a part. Returns the first of `paths`. Raises InputError
    where no cell has its host time.
    """
    known = [cell for cell in cells if cell.get("host_per_layer_ns")]
    if not known:
        raise InputError("no measured cell says its host time per layer")
    order = sorted(known, key=lambda cell: (cell["anchor"] is None, cell["name"]), reverse=True)
    with style.style():
        figure = style.blank((10.5, max(3.6, 0.3 * len(order) + 1.4)))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
        _stack(left, order, _WORK)
        _stack(right, order, _WAIT)
        left.set_yticks(range(len(order)), [cell["name"] for cell in order], fontsize=8)
        left.set_ylim(-0.6, len(order) - 0.4)
        left.set_xlabel("work per layer, microseconds")
        right.set_xlabel("waiting per layer, microseconds")
        left.set_title(style.wrapped(f"Measured on {machine}. Bars: medians; lines: p10 to p90", 5.5), loc="left")
        figure.legend(loc="outside lower center", ncols=3)
        return style.save(figure, paths)


def _stack(axis: Axes, cells: Sequence[Mapping[str, Any]], parts: Mapping[str, tuple[str, str]]) -> None:
    """Draw a bar of `parts` for each cell, and across the end of each part the line of its spread, one below the other."""
    places = np.arange(len(cells))
    starts = np.zeros(len(cells))
    for number, (name, (colour, label)) in enumerate(parts.items()):
        p10, median, p90 = (
            np.array([cell["host_per_layer_ns"][name][which] for cell in cells]) / 1e3 for which in ("p10", "median", "p90")
        )
        axis.barh(places, median, left=starts, height=0.74, color=colour, linewidth=0, label=label)
        heights = places + 0.37 - 0.74 * (number + 0.5) / len(parts)
        axis.hlines(heights, starts + p10, starts + p90, color="black", linewidth=0.8)
        starts += median
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
