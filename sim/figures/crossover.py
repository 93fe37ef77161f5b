"""The figure of crossovers: which system wins at which link bandwidth and budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch

from sim.figures import style
from sim.figures.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from sim.hardware import make_hardware
from sim.report import SETTING, ranked, records, split, synthetic
from traces.errors import InputError

_COLOURS = (BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE, "#999999", "#F0E442")
"""Okabe and Ito's, all eight: areas are larger than lines."""


def crossover_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw a field of link bandwidths by budgets, each in the colour of the fastest system there, ceilings left out.

    In every field stand the winner's lead over lru and a "=" where its rank is shared (`ranked`). Machines of equal
    bandwidth have columns of their own. Several settings (traces, models, ...) have panels of their own. Returns the
    first of `paths`; raises InputError where there is one machine only.
    """
    won = pd.concat([table[~table["ceiling"]].iloc[:1] for table in split(ranked(rows))])
    won = won.assign(bandwidth=[_bandwidth(text) for text in won["config"]])
    shared = [name for name in SETTING if name != "hardware"]
    groups = [group for _, group in won.groupby(shared, sort=False, dropna=False)]
    groups = [group for group in groups if group["hardware"].nunique() > 1]
    if not groups:
        raise InputError(
            "a crossover needs results of one trace on two machines or more: store some with hardware=NAME, or with "
            "another link_gb_per_s (foregate sweep experiment=hardware_crossover)"
        )
    winners = list(pd.concat(groups)["system"].value_counts().index)
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(winners)}
    across = max(group["hardware"].nunique() for group in groups)
    down = sum(group["budget"].nunique() for group in groups)
    width = max(6.5, 1.15 * across + 2.8)
    with style.style():
        figure = style.blank((width, 0.42 * down + 1.75 * len(groups)))
        axes = figure.subplots(len(groups), 1, squeeze=False).ravel()
        for axis, group in zip(axes, groups, strict=True):
            _draw_field(axis, group, winners, colours, width)
        handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside right upper", title="fastest", alignment="left")
        return style.save(figure, paths)


def _draw_field(axis: Any, group: pd.DataFrame, winners: list[str], colours: dict[str, str], width: float) -> None:
    machines = group.sort_values("bandwidth", kind="stable").drop_duplicates("hardware")
    budgets = sorted(group["budget"].unique())
    field = np.full((len(budgets), len(machines)), np.nan)
    for row in records(group):
        y, x = budgets.index(row["budget"]), list(machines["hardware"]).index(row["hardware"])
        field[y, x] = winners.index(row["system"])
        lead = "" if np.isnan(row["speed_vs_lru"]) else f"{row['speed_vs_lru']:.2f}x"
        shared = " =" if row["rank"].startswith("=") else ""
        dark = np.dot(to_rgb(colours[row["system"]]), (0.3, 0.59, 0.11)) < 0.5
        axis.text(x, y, lead + shared, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.imshow(
        field,
        cmap=ListedColormap([colours[name] for name in winners]),
        vmin=-0.5,
        vmax=len(winners) - 0.5,
        aspect="auto",
        origin="lower",
    )
    names = [_machine(name) for name in machines["hardware"]]
    one = len(set(names)) == 1
    below = [
        f"{row['bandwidth']:.3g}" + ("" if one else f"\n{name}") for row, name in zip(records(machines), names, strict=True)
    ]
    axis.set_xticks(range(len(machines)), below, fontsize=7.5)
    axis.set_yticks(range(len(budgets)), [f"{100 * share:.3g}" for share in budgets])
    axis.set_xticks(np.arange(len(machines) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(budgets) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("link, GB/s (as set, else at the largest copy of its curve)")
    axis.set_ylabel("budget, % of all experts")
    first = group.iloc[0]
    routed = f"routing of {first['trace_model']}, " if first["trace_model"] not in ("", first["model"]) else ""
    equal = ", = where the rank is shared" if group["rank"].str.startswith("=").any() else ""
    what = f"{synthetic(group)}trace {first['trace']}, {first['workload']}; {routed}bytes of {first['model']}"
    what += f" on {names[0].replace(chr(10), '_')}" if one else ""
    axis.set_title(style.wrapped(f"{what}. In the fields: speed against lru{equal}", width - 2.2), loc="left")


def _bandwidth(config: str) -> float:
    """Return the bandwidth of a row's link, GB/s: as set, else that of the largest copy of its measured curve."""
    settings = json.loads(config)
    if settings.get("link_gb_per_s") is not None:
        return float(settings["link_gb_per_s"])
    size, ns = make_hardware(settings["hardware"]).h2d[-1]
    return size / ns


def _machine(name: str) -> str:
    """Return a machine's name in lines that fit under a column; changes to its constants are what the bandwidth says."""
    return name.partition("+")[0].replace("_", "\n", 1)
