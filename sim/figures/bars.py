"""Figures of bars: the ranking, where the time goes, what crosses the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sim.figures import style
from sim.figures.style import GREEN, GREY, ORANGE, PARTS, PURPLE, SKY, VERMILLION
from sim.report import budget, ranked, records, split

Stack = Mapping[str, tuple[str, str]]
"""What a bar stacks, from the axis outwards: (colour, name) by column."""

_TIME: Stack = {f"{part}_ms_per_token": look for part, look in PARTS.items()}

_TRAFFIC: Stack = {
    "useful_mb": (GREEN, "prefetched in time"),
    "late_mb": (SKY, "prefetched too late"),
    "demand_mb": (ORANGE, "loaded on a miss"),
    "wasted_mb": (VERMILLION, "prefetched and never used"),
    "refresh_mb": (PURPLE, "again after use"),
}

_PANEL = 6.9
"""Width of a panel, inches."""


def ranking_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw a panel per budget: a bar of ms per token for every system, and its tokens/s beside it.

    The fastest is on top; ceilings stand hatched and pale at the bottom; "=" after a figure means that the
    rank is shared (`ranked`). The line across a bar's end is the 95 % interval of the difference to lru. Several
    settings in `rows` (traces, hardware, ...) have panels of their own. Returns the first of `paths`.
    """
    tables = split(ranked(rows))
    shared = any(table["rank"].str.startswith("=").any() for table in tables)
    told = any(pd.notna(_intervals(table)).any() for table in tables)
    equal = ", = where a rank is shared" if shared else ""
    labels = [
        [f"{style.short(row['tokens_per_s'])}{' =' if row['rank'].startswith('=') else ''}" for row in records(table)]
        for table in tables
    ]
    interval = Line2D([], [], color="black", linewidth=1, marker="|", markersize=6, label="95 % interval against lru")
    return _draw(
        tables,
        _TIME,
        labels,
        f"ms per token (beside the bars: tokens/s{equal})",
        paths,
        [_intervals(table) for table in tables],
        [interval] if told else [],
    )


def traffic_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw a panel per budget: what crosses the link for a token, MB by what became of it; the order is the ranking's.

    Returns the first of `paths`.
    """
    tables = [_with_megabytes(table) for table in split(ranked(rows))]
    moved = pd.concat(tables)
    stack = {name: look for name, look in _TRAFFIC.items() if name == "demand_mb" or moved[name].any()}
    labels = [[style.short(value) for value in table["moved_mb_per_token"]] for table in tables]
    return _draw(tables, stack, labels, "MB per token (the sum beside the bars); fastest system on top", paths)


def time_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw a panel per system: where the time of a token goes at every budget. Returns the first of `paths`."""
    tables = split(ranked(rows))
    found = [pd.concat(panel) for panel in style.by_setting(tables)]
    names = [_in_order(points) for points in found]
    panel = max(1.85, 0.08 * max(len(label) for labels in names for label in labels) + 0.2)  # titles stand side by side
    across = min(max(1, int(11.1 / panel)), max(map(len, names)))
    downs = [-(-len(labels) // across) for labels in names]
    height = 1.75 * sum(downs) + (0.5 * len(found) if len(found) > 1 else 0)
    with style.style():
        figure, axes = style.panels(tables, (panel * across + 0.6, height), (sum(downs), across), panel * across)
        for axis in axes:
            axis.set_axis_off()
        first = 0
        for points, labels, down in zip(found, names, downs, strict=True):
            longest = float(points[list(_TIME)].sum(axis=1).max())
            for place, label in enumerate(labels):
                above = style.heading(points, panel * across) if len(found) > 1 and place == 0 else ""
                axis = axes[first + place]
                _draw_budgets(axis, points[points["label"] == label].sort_values("budget"), longest, above)
                if place % across == 0:
                    axis.set_ylabel("ms per token")
                if place + across >= len(labels):
                    axis.set_xlabel("budget, %")
            first += down * across
        handles = [Patch(facecolor=colour, label=name) for colour, name in _TIME.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return style.save(figure, paths)


def _draw_budgets(axis: Axes, line: pd.DataFrame, longest: float, above: str) -> None:
    """Draw one system: a bar per budget, on an axis that ends beyond `longest` ms; `above` is what its row is of."""
    ceiling = bool(line["ceiling"].iloc[0])
    axis.set_axis_on()
    ends = np.zeros(len(line))
    for name, (colour, _) in _TIME.items():
        lengths = line[name].fillna(0).to_numpy(dtype=float)
        axis.bar(range(len(line)), lengths, bottom=ends, width=0.74, color=colour, linewidth=0, alpha=0.5 if ceiling else 1)
        ends += lengths
    axis.set_xticks(range(len(line)), [f"{100 * share:.3g}" for share in line["budget"]], fontsize=7)
    axis.set_xlim(-0.6, len(line) - 0.4)
    axis.set_ylim(0, 1.05 * max(longest, 1e-9))
    axis.grid(axis="y")
    look: dict[str, Any] = {"color": GREY, "fontstyle": "italic"} if ceiling else {}
    # The layout would widen the panel for what stands above its title: it is given the height alone.
    axis.set_title("\n" * (len(above.splitlines()) + bool(above)) + line["label"].iloc[0], loc="left", fontsize=8, **look)
    beside: dict[str, Any] = {"textcoords": "offset points", "xycoords": "axes fraction", "fontsize": 8}
    axis.annotate(above, (0, 1), xytext=(0, 18), **beside).set_in_layout(False)


def _in_order(points: pd.DataFrame) -> list[str]:
    """Return the labels as in the ranking at the largest budget, ceilings last."""
    order = points.sort_values(["ceiling", "budget", "tokens_per_s"], ascending=[True, False, False], kind="stable")
    return list(order["label"].drop_duplicates())


def _with_megabytes(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a column of MB per token for every kind of traffic."""
    kinds = {name: f"{name.removesuffix('_mb')}_bytes" for name in _TRAFFIC}
    moved = table[list(kinds.values())].sum(axis=1).replace(0, 1)
    return table.assign(**{name: table[column] / moved * table["moved_mb_per_token"] for name, column in kinds.items()})


def _intervals(table: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Return [systems, 2] ms per token between which each lies by its interval against lru; NaN where none is claimed."""
    times = table[list(_TIME)].sum(axis=1)
    claimed = table["speed_vs_lru_is_real"].notna() & (table["speed_vs_lru_low"] < table["speed_vs_lru_high"])
    of_lru = (times * table["speed_vs_lru"]).where(claimed)
    return np.stack([of_lru / table["speed_vs_lru_high"], of_lru / table["speed_vs_lru_low"]], axis=1)


def _draw(
    tables: Sequence[pd.DataFrame],
    stack: Stack,
    labels: Sequence[Sequence[str]],
    title: str,
    paths: Sequence[str | Path],
    intervals: Sequence[np.ndarray[Any, Any]] | None = None,
    handles: Sequence[Any] = (),
) -> Path:
    """Draw a panel of horizontal bars per table; `labels` stand at their ends, `intervals` [systems, 2] across them."""
    across = min(len(tables), 2)
    down = -(-len(tables) // across)
    height = down * (0.23 * max(len(table) for table in tables) + 1.25)
    with style.style():
        figure, axes = style.panels(tables, (_PANEL * across, height), (down, across), _PANEL * across)
        longest = _longest(tables, stack)
        for place, (axis, table) in enumerate(zip(axes, tables, strict=False)):
            across_ends = np.full((len(table), 2), np.nan) if intervals is None else intervals[place]
            _draw_bars(axis, table, stack, labels[place], longest[style.setting_of(table)], across_ends)
            above = f"{style.heading(table, _PANEL - 1.7)}\n" if len(longest) > 1 else ""
            axis.set_title(above + budget(table), loc="left")
            axis.set_xlabel(title)
        for axis in axes[len(tables) :]:
            axis.set_axis_off()
        known = [*(Patch(facecolor=colour, label=name) for colour, name in stack.values()), *handles]
        if any(table["ceiling"].any() for table in tables):
            pale: dict[str, Any] = {"facecolor": "0.6", "edgecolor": "white", "hatch": "////", "linewidth": 0}
            known.append(Patch(label="ceiling, no real system", **pale))
        figure.legend(handles=known, loc="outside lower center", ncols=len(known) if across > 1 else 2)
        return style.save(figure, paths)


def _draw_bars(
    axis: Axes, table: pd.DataFrame, stack: Stack, labels: Sequence[str], longest: float, intervals: np.ndarray[Any, Any]
) -> None:
    """Draw one table from the top down, with a gap before the ceilings; the axis ends beyond `longest`."""
    ceiling = table["ceiling"].to_numpy(dtype=bool)
    places = np.arange(len(table)) + 0.6 * (ceiling & (~ceiling).any())
    ends = np.zeros(len(table))
    for column, (colour, _) in stack.items():
        lengths = table[column].fillna(0).to_numpy(dtype=float)
        for bar, is_ceiling in zip(
            axis.barh(places, lengths, left=ends, height=0.74, color=colour, linewidth=0), ceiling, strict=True
        ):
            if is_ceiling:
                bar.set(alpha=0.5, hatch="////", edgecolor="white")
        ends += lengths
    axis.hlines(places, *intervals.T, color="black", linewidth=1)
    axis.plot(intervals, np.stack([places, places], axis=1), "|", color="black", markersize=6)
    for place, end, text, is_ceiling in zip(places, np.fmax(ends, intervals[:, 1]), labels, ceiling, strict=True):
        colour = GREY if is_ceiling else "black"
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(text, (end, place), fontsize=8, color=colour, **beside)
    axis.set_yticks(places, list(table["label"]))
    for label, is_ceiling in zip(axis.get_yticklabels(), ceiling, strict=True):
        label.set(color=GREY if is_ceiling else "black", fontstyle="italic" if is_ceiling else "normal")
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_xlim(0, longest * 1.13)  # room for the figures at the ends of the bars
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _longest(tables: Sequence[pd.DataFrame], stack: Stack) -> dict[tuple[Any, ...], float]:
    """Return the longest bar of every setting: all its budgets have one scale and can be compared."""
    return {
        style.setting_of(panel[0]): max(float(pd.concat(panel)[list(stack)].sum(axis=1).max()), 1e-9)
        for panel in style.by_setting(tables)
    }
