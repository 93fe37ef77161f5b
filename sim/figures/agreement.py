"""The figure of the validation: simulated against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from sim.figures import style
from sim.figures.style import BLUE, GREY, VERMILLION


def agreement_figure(cells: Sequence[Mapping[str, Any]], machine: str, *paths: str | Path) -> Path:
    """Draw every cell of a validation: its simulated against its measured step, and how far it is off.

    `cells` are those of a ``summary.json`` (docs/validation.md), measured on `machine`. Anchors are squares; the hollow
    marks are the executor's own decisions, priced. Returns the first of `paths`.
    """
    order = sorted(cells, key=lambda cell: (cell["anchor"] is None, cell["name"]), reverse=True)
    measured = np.array([cell["measured_tpot_ns"] for cell in order]) / 1e6
    simulated = np.array([cell["simulated_tpot_ns"] for cell in order]) / 1e6
    priced = np.array([cell["priced_tpot_ns"] for cell in order]) / 1e6
    with style.style():
        figure = style.blank((10.5, max(4.2, 0.26 * len(order) + 1.3)))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
        ends = 0.8 * min(measured.min(), simulated.min()), 1.25 * max(measured.max(), simulated.max())
        line = np.array(ends)
        left.plot(line, line, color=GREY, linewidth=0.8)
        left.fill_between(line, 0.8 * line, 1.2 * line, color="0.93", linewidth=0)
        for anchor, look in ((True, {"marker": "s", "color": VERMILLION}), (False, {"marker": "o", "color": BLUE})):
            some = np.array([(cell["anchor"] is not None) is anchor for cell in order])
            left.plot(measured[some], simulated[some], linestyle="", label="anchor" if anchor else "system", **look)
            right.plot((simulated / measured - 1)[some], np.flatnonzero(some), linestyle="", **look)
        right.plot(
            priced / measured - 1,
            range(len(order)),
            "D",
            color="black",
            markerfacecolor="none",
            markersize=7,
            label="decisions as measured, priced",
        )
        left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", anchor="N")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_locator(_ticks(*ends))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        left.set_xlabel("measured, ms per token")
        left.set_ylabel("simulated, ms per token")
        left.set_title(style.wrapped(f"Measured on {machine}. Grey: within 20 %", 4.4), loc="left")
        left.legend(loc="lower right")
        left.grid()
        right.axvline(0, color=GREY, linewidth=0.8)
        right.set_yticks(range(len(order)), [cell["name"] for cell in order], fontsize=8)
        right.set_ylim(-0.7, len(order) - 0.3)
        right.tick_params(axis="y", length=0)
        right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.set_xlabel("(simulated - measured) / measured")
        errors = np.abs(simulated / measured - 1)
        right.set_title(f"error of a step: mean {errors.mean():.1%}, worst {errors.max():.1%}", loc="left")
        right.grid(axis="x")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right")
        return style.save(figure, paths)


def _ticks(low: float, high: float) -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5)) if high / low < 300 else LogLocator()
