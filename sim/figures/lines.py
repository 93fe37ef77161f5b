"""Figures of lines: speed against budget, misses against cache size, predictions layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from policies.contract import needs_of
from policies.system import Part, find_part
from sim.config import Config
from sim.curves import miss_curve
from sim.experiment import composition_of, costs_of, system_of, workload_of
from sim.figures import style
from sim.predictions import predictions_by_layer
from sim.report import ranked, records, split, synthetic
from traces.errors import InputError

_WIDTH = 9.0

SIZES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
"""Cache sizes of a miss curve, as shares of all experts."""


def budget_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw tokens/s against the budget: a line per system and a dashed grey one per ceiling.

    Several settings in `rows` have panels of their own. The axis of tokens/s is logarithmic where the fastest
    is more than 8 times as fast as the slowest. Returns the first of `paths`.
    """
    tables = split(ranked(rows))
    panels = style.by_setting(tables)
    styles = style.line_styles(tables)
    height = max(4.6 * len(panels), 0.19 * len(styles) + 1.0)
    beside_the_legend = _WIDTH - 1.5 - 0.08 * max(len(label) for label in styles)
    with style.style():
        figure, axes = style.panels(tables, (_WIDTH, height), (len(panels), 1), beside_the_legend)
        for axis, panel in zip(axes, panels, strict=True):
            points = pd.concat(panel)
            for label, look in styles.items():
                line = points[points["label"] == label].sort_values("budget")
                axis.plot(100 * line["budget"], line["tokens_per_s"], **look)
            _label_budget_axes(axis, points)
            if len(panels) > 1:
                axis.set_title(style.heading(panel[0], beside_the_legend - 1), loc="left")
        _legend(figure, styles)
        return style.save(figure, paths)


def miss_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw the misses of every eviction policy in `rows` against the size of the cache: one pool, no time, no prefetch.

    The traces that the rows name are replayed at `SIZES` (`sim.curves.miss_curve`), with Belady's policy for the fewest
    misses possible. Returns the first of `paths`; raises InputError where a trace is no longer there.
    """
    tables = split(ranked(rows))
    panels = [pd.concat(panel) for panel in style.by_setting(tables)]
    panels = list({tuple(points.iloc[0][["trace_hash", "workload"]]): points for points in reversed(panels)}.values())[::-1]
    curves = [_miss_shares(points) for points in panels]
    names = list(dict.fromkeys(name for found in curves for name in found if name != "Belady"))
    looks = {name: style.solid(place) for place, name in enumerate(names)} | {"Belady": style.dashed(0)}
    beside_the_legend = _WIDTH - 2.2 - 0.08 * max(len(name) for name in looks)
    with style.style():
        figure = style.blank((_WIDTH, 4.8 * len(panels)))
        axes = figure.subplots(len(panels), 1, squeeze=False).ravel()
        for axis, points, found in zip(axes, panels, curves, strict=True):
            for name, shares in found.items():
                axis.plot([100 * size for size in SIZES], [100 * share for share in shares], **looks[name])
            axis.set(xlim=(0, 102), ylim=(0, None))
            axis.set_xlabel("cache, % of all experts")
            axis.set_ylabel("misses, % of the experts needed")
            axis.grid()
            first = points.iloc[0]
            what = f"{synthetic(points)}trace {first['trace']}, {first['workload']}: one cache for all layers, no prefetch"
            axis.set_title(style.wrapped(what, beside_the_legend), loc="left")
        _legend(figure, looks)
        return style.save(figure, paths)


def prediction_figure(rows: pd.DataFrame, *paths: str | Path) -> Path:
    """Draw precision and recall of every predictor in `rows` by the layer that was foretold, one pair of panels per routing.

    The predictions are made again from the traces that the rows name (`sim.predictions`), at the smallest stored budget,
    and must give the rows' precision and recall. Returns the first of `paths`; raises InputError where no system predicts,
    a trace is no longer there, or it gives other predictions than those stored.
    """
    tables = split(ranked(rows))
    panels = []
    # What is foretold does not depend on the machine.
    for _, points in pd.concat(tables).groupby(["trace_hash", "workload"], sort=False):
        points = points.sort_values("budget", kind="stable").drop_duplicates("label")
        points = points[points["predictor_precision"].notna()]
        if len(points):
            # Systems that differ in their caches only predict the same: one line for all of them.
            alike = points.groupby(points["config"].map(_what_predicts), sort=False)["label"]
            points = points.assign(label=alike.transform(",\n".join))
            panels.append(points.drop_duplicates("label"))
    if not panels:
        raise InputError("no stored result is of a system that predicts: there is no precision or recall to draw")
    styles = style.line_styles([pd.concat(panels)])
    beside_the_legend = _WIDTH - 1.5 - 0.08 * max(len(line) for label in styles for line in label.split("\n"))
    with style.style():
        figure = style.blank((_WIDTH, 5.8 * len(panels)))
        axes = figure.subplots(2 * len(panels), 1).ravel()
        for place, points in enumerate(panels):
            pair = axes[2 * place : 2 * place + 2]
            for row in records(points):
                shares = _layer_shares(row)
                for axis, share in zip(pair, shares, strict=True):
                    axis.plot(range(len(share)), 100 * share, **styles[row["label"]])
            for axis, what in zip(
                pair, ("of the predicted, needed, %\n(precision)", "of the needed, predicted, %\n(recall)"), strict=True
            ):
                axis.set(ylim=(0, 103), ylabel=what)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.grid()
            pair[1].set_xlabel("layer that was foretold")
            first = points.iloc[0]
            what = f"{synthetic(points)}trace {first['trace']}, {first['workload']}: predictions by layer"
            pair[0].set_title(style.wrapped(what, beside_the_legend - 1), loc="left")
        _legend(figure, styles)
        return style.save(figure, paths)


def _miss_shares(points: pd.DataFrame) -> dict[str, list[float]]:
    """Return the share of misses at every size of `SIZES`, by the name of the eviction policy; Belady's last."""
    configs: list[Config] = [json.loads(text) for text in points["config"]]
    used = [composition_of(config).parts["eviction"] for config in configs]
    used = [part for place, part in enumerate(used) if part not in used[:place] and "future" not in needs_of(part[0])]
    classes = [cls for cls, _ in used]
    parts: dict[str, Part] = {}
    for cls, parameters in used:
        twins = classes.count(cls) > 1
        values = ", ".join(f"{name} {value}" for name, value in parameters.items())
        parts[f"{cls.__name__} ({values})" if twins else cls.__name__] = (cls, parameters)
    parts["Belady"] = find_part("eviction", {"_target_": "policies.eviction.belady.Belady"})
    events = workload_of(configs[0]).events
    slots = [max(1, int(size * events.layers * events.experts)) for size in SIZES]
    found = {name: miss_curve(part, events, slots, seed=configs[0]["seed"]) for name, part in parts.items()}
    return {name: [one.misses / one.accesses for one in curve] for name, curve in found.items()}


def _what_predicts(config: str) -> str:
    """Return the part of a row's configuration that decides its predictions."""
    parts: Config = json.loads(config)
    return json.dumps([parts["predictor"], parts["prefetch"], parts["seed"]], sort_keys=True)


def _layer_shares(row: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return precision and recall of a stored row by layer; NaN for a layer that nothing was predicted for."""
    config: Config = json.loads(row["config"])
    workload = workload_of(config)
    costs, _ = costs_of(config, workload)
    found = predictions_by_layer(system_of(config, workload, costs), workload)
    again = [
        found.predicted_and_needed.sum() / max(1, whole.sum()) for whole in (found.predicted, found.needed_after_prediction)
    ]
    if again != [row["predictor_precision"], row["predictor_recall"]] or workload.trace.hash != row["trace_hash"]:
        raise InputError(
            f"{row['label']}: its predictions have a precision of {again[0]:.4f} now and {row['predictor_precision']:.4f} "
            "in the stored result: trace or code have changed; run it again"
        )
    hits = found.predicted_and_needed
    whole = [np.where(count > 0, count, np.nan) for count in (found.predicted, found.needed_after_prediction)]
    return hits / whole[0], hits / whole[1]


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


def _legend(figure: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    handles = [Line2D([], [], label=label, **look) for label, look in styles.items()]
    figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
