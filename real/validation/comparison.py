"""Validation: how far the simulation is from measured runs, component by component, decision by decision, rank by rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from policies.contract import Ints
from real.systems import cell_system
from real.validation.measured import MeasuredRun
from real.validation.pricing import JUDGED, STARTS, Log, Priced, by_event, price
from sim.costs import Costs, make_costs, with_free_link
from sim.engines import run_engine
from sim.hardware import Hardware
from sim.reference import Span, run_reference
from sim.result import StepTimes
from sim.workload import Workload, make_workload
from traces import Trace, bundled, load_trace
from traces.errors import InputError
from traces.trace import ModelSpec

COMPONENTS = ("compute", "wait", "host", "link_busy")
"""What a step's time is compared by; the first three add up to its duration."""

ANCHORS = ("all resident", "all missing", "perfect prefetch")
"""What must agree before anything else is believed."""


class Component(NamedTuple):
    """Means per step, ns, over the steps in which the parts were measured."""

    name: str
    measured_ns: float
    simulated_ns: float
    error: float
    """(simulated - measured) / measured duration of a step: errors of compute, wait and host add up to that of the total."""


class Loop(NamedTuple):
    """A simulation beside a measured run."""

    tpot_ns: float
    """Simulated mean duration of the timed decode steps."""
    error: float
    """``tpot_ns`` / measured - 1."""
    components: list[Component]
    """By `COMPONENTS`; empty where the run has no marked steps."""


class Divergence(NamedTuple):
    """Where the simulator decided differently from the executor."""

    events: int
    differing: int
    """Events whose experts there, experts missing or evictions differ."""
    late: int
    """Events that differ only in which experts were still in flight."""
    first: int | None
    """The first of the differing events."""


class CellReport(NamedTuple):
    """One cell, measured and simulated twice."""

    name: str
    system: str
    anchor: str | None
    """Which of `ANCHORS` it is, if one."""
    group: str
    """Cells of one group differ in their systems only."""
    measured_tpot_ns: float
    open_loop: Loop
    """The executor's decisions, priced: what differs is the hardware model."""
    closed_loop: Loop
    """The simulator decides: what differs is everything."""
    divergence: Divergence
    spread_ns: float
    """By how much the measured TPOT would at most be longer without one of the passes."""
    median_tpot_ns: float
    """Measured TPOT with every step's median over the passes in place of its quickest."""
    copy_efficiency: float | None
    host_per_layer_ns: dict[str, dict[str, float]] | None
    """As in `real.validation.measured.MeasuredRun`."""
    logs: tuple[Log, Log]
    """The executor's and the simulator's."""


def compare_cell(run: MeasuredRun, trace: Trace, hardware: Hardware) -> CellReport:
    """Simulate the cell of `run` on `hardware`, open and closed loop, and return the differences.

    In a cell that was preloaded nothing is left to decide: its closed loop is its open one. Raises InputError where `trace`
    is not the one that was run, or is too short.
    """
    whole, workload, costs = _as_simulated(run, trace, hardware)
    priced, simulated, log = _both_loops(run, whole, workload, costs)
    link_busy = price(log, workload, costs, cell_system(run.cell, whole)).link_busy_ns
    return CellReport(
        name=run.name,
        system=run.cell["system"]["name"],
        anchor=anchor_of(run.cell),
        group=json.dumps([run.trace_hash, run.cell["workload"], run.cell["model"], run.cell["slots"]], sort_keys=True),
        measured_tpot_ns=_tpot(run),
        open_loop=_loop(run, priced.steps, priced.link_busy_ns),
        closed_loop=_loop(run, simulated, link_busy),
        divergence=divergence(run.log, log, workload.events.total),
        spread_ns=_spread_ns(run),
        median_tpot_ns=_median_tpot(run),
        copy_efficiency=run.copy_efficiency,
        host_per_layer_ns=run.host_per_layer_ns,
        logs=(run.log, log),
    )


def _both_loops(run: MeasuredRun, whole: Workload, workload: Workload, costs: Costs) -> tuple[Priced, StepTimes, Log]:
    """Return the executor's decisions, priced, and the simulator's steps with its log."""
    priced = price(run.log, workload, costs, cell_system(run.cell, whole))
    if run.cell["preload"]:
        return priced, priced.steps, run.log
    log: list[tuple[Any, ...]] = []
    simulated, _ = run_engine("auto", lambda: cell_system(run.cell, whole), workload, costs, log)
    return priced, simulated.steps, log


def simulated_spans(run: MeasuredRun, trace: Trace, hardware: Hardware) -> list[Span]:
    """Return what every resource does in the closed loop, by the reference engine. Raises InputError.

    A cell that was preloaded is shown with a free link, which after some steps comes to the same.
    """
    whole, workload, costs = _as_simulated(run, trace, hardware)
    spans: list[Span] = []
    shown = with_free_link(costs) if run.cell["preload"] else costs
    run_reference(cell_system(run.cell, whole), workload, shown, spans=spans)
    return spans


def _as_simulated(run: MeasuredRun, trace: Trace, hardware: Hardware) -> tuple[Workload, Workload, Costs]:
    """Return the trace's whole workload, its steps that were measured, and what they cost."""
    if trace.hash != run.trace_hash:
        raise InputError(
            f"'{run.name}' was measured on another trace: it has the hash {run.trace_hash[:12]}, not {trace.hash[:12]}"
        )
    whole = make_workload(trace, **run.cell["workload"])
    workload = first_steps(whole, int(run.steps["step"].max()) + 1)
    return whole, workload, cell_costs(run.cell, hardware, workload)


def anchor_of(cell: Mapping[str, Any]) -> str | None:
    """Return which anchor a cell is: by its preload or its system."""
    if cell["preload"]:
        return ANCHORS[0]
    return {"load_on_demand": ANCHORS[1], "clairvoyant": ANCHORS[2], "perfect_prediction": ANCHORS[2]}.get(
        cell["system"]["name"]
    )


def divergence(executed: Log, simulated: Log, events: int) -> Divergence:
    """Compare the decisions of two logs event by event."""
    sides = [
        (by_event(log, events, JUDGED[:2]), by_event(log, events, JUDGED[2:]), by_event(log, events, ("evict",)))
        for log in (executed, simulated)
    ]
    late = [by_event(log, events, JUDGED[1:2]) for log in (executed, simulated)]
    differ = [any(mine[event] != other[event] for mine, other in zip(*sides, strict=True)) for event in range(events)]
    only_late = [late[0][event] != late[1][event] and not differ[event] for event in range(events)]
    return Divergence(events, sum(differ), sum(only_late), differ.index(True) if any(differ) else None)


class Ranking(NamedTuple):
    """How far simulation and measurement order systems alike."""

    tau_of_all: float | None
    """`tau` over all pairs, those that are too close among them."""

    tau: float | None
    """Kendall's tau: 1 where every pair is ordered the same, -1 where every pair is reversed; a tie in the simulation counts
    as neither. None where there is no pair."""
    pairs: int
    """Pairs of one group's systems, anchors left out, that the measurement tells apart."""
    too_close: int
    """Pairs whose measured difference is within the spread of their passes."""


def ranking(reports: Sequence[CellReport]) -> Ranking:
    """Compare the order of simulated and measured TPOT, pair by pair."""
    pairs = agreeing = too_close = agreeing_of_all = 0
    for one, other in combinations([report for report in reports if report.anchor is None], 2):
        if one.group != other.group:
            continue
        measured = one.measured_tpot_ns - other.measured_tpot_ns
        agrees = int(np.sign(measured) * np.sign(one.closed_loop.tpot_ns - other.closed_loop.tpot_ns))
        agreeing_of_all += agrees
        if abs(measured) < one.spread_ns + other.spread_ns:
            too_close += 1
            continue
        pairs += 1
        agreeing += agrees
    all_pairs = pairs + too_close
    return Ranking(agreeing_of_all / all_pairs if all_pairs else None, agreeing / pairs if pairs else None, pairs, too_close)


def of_bound(runs: Sequence[MeasuredRun]) -> float | None:
    """Return how near the fastest system of a shape and number of slots comes to what C and X allow; the least of all these.

    A step cannot be shorter than C, that of the same shape with all experts resident, nor than X, the link's time for what
    was started in the timed steps. None where no system's C or X is known.
    """
    resident = {json.dumps(run.cell["model"]): _tpot(run) for run in runs if run.cell["preload"]}
    fastest: dict[tuple[str, int], tuple[float, float]] = {}
    for run in runs:
        shape = json.dumps(run.cell["model"])
        if anchor_of(run.cell) or shape not in resident or not run.link_bytes_per_s:
            continue
        step_ns = _tpot(run)
        share = max(resident[shape], _link_ns_per_step(run)) / step_ns
        place = (shape, run.cell["slots"])
        fastest[place] = min(fastest.get(place, (step_ns, share)), (step_ns, share))
    return min((share for _, share in fastest.values()), default=None)


def _link_ns_per_step(run: MeasuredRun) -> float:
    """Return the time that the link needs for the experts whose transfer was started in the timed steps, per step."""
    spec = decoder_spec(run.cell["model"])
    steps = set(run.timed["step"].tolist())
    started = sum(what in STARTS and event // spec.layers in steps for _, what, _, event in run.log)
    assert run.link_bytes_per_s is not None
    return float(started * spec.expert_bytes["bf16"] / len(steps) / run.link_bytes_per_s * 1e9)


def summary(
    reports: Sequence[CellReport], over_best_peer: float | None = None, of_bound: float | None = None
) -> dict[str, Any]:
    """Return the figures of a validation; those that were not measured are None. Errors are of the closed loop's TPOT."""
    ranks = ranking(reports)
    errors = [abs(report.closed_loop.error) for report in reports]
    of_medians = [abs(report.closed_loop.tpot_ns / report.median_tpot_ns - 1) for report in reports]
    efficiencies = [report.copy_efficiency for report in reports if report.copy_efficiency is not None]
    return {
        "cells": [
            {
                "name": report.name,
                "anchor": report.anchor,
                "measured_tpot_ns": report.measured_tpot_ns,
                "spread_ns": report.spread_ns,
                "median_tpot_ns": report.median_tpot_ns,
                "simulated_tpot_ns": report.closed_loop.tpot_ns,
                "priced_tpot_ns": report.open_loop.tpot_ns,
                "error": report.closed_loop.error,
                "host_per_layer_ns": report.host_per_layer_ns,
            }
            for report in reports
        ],
        "mean_error": float(np.mean(errors)) if errors else None,
        "worst_error": max(errors, default=None),
        "mean_error_of_medians": float(np.mean(of_medians)) if of_medians else None,
        "worst_error_of_medians": max(of_medians, default=None),
        "kendall_tau": ranks.tau_of_all,
        "kendall_tau_of_pairs_apart": ranks.tau,
        "pairs": ranks.pairs,
        "pairs_too_close": ranks.too_close,
        "copy_efficiency": min(efficiencies, default=None),
        "over_best_peer": over_best_peer,
        "of_bound": of_bound,
    }


def in_order(reports: Sequence[CellReport]) -> list[CellReport]:
    """Return reports with the anchors first."""
    return sorted(reports, key=lambda report: ANCHORS.index(report.anchor) if report.anchor else len(ANCHORS))


# ---- a cell in the simulator -------------------------------------------------------------------------------------


def first_steps(workload: Workload, count: int) -> Workload:
    """Return the first `count` steps of a workload. Raises InputError where it has fewer."""
    if count > len(workload.decode):
        raise InputError(f"{count} steps were measured, but the workload has {len(workload.decode)}")
    end = int(workload.offsets[count])
    return replace(workload, rows=workload.rows[:end], offsets=workload.offsets[: count + 1], decode=workload.decode[:count])


def cell_costs(cell: Mapping[str, Any], hardware: Hardware, workload: Workload) -> Costs:
    """Return what the cell's decoder costs on `hardware`, in copies of the cell's size."""
    machine = replace(hardware, chunk_bytes=cell["chunk_bytes"])
    spec = replace(decoder_spec(cell["model"]), name=workload.trace.model.name)  # whose times may have been measured
    return make_costs(machine, spec, np.diff(workload.offsets), workload.context)


def decoder_spec(shape: Mapping[str, int]) -> ModelSpec:
    """Return the sizes of a replay decoder (`real.decoder.ModelShape`): what a step reads, so without the embedding."""
    hidden, layers = shape["hidden"], shape["layers"]
    per_layer = 4 * hidden**2 + shape["experts"] * hidden + 3 * shape["shared_width"] * hidden
    return ModelSpec(
        "replay decoder",
        layers,
        shape["experts"],
        shape["top_k"],
        hidden_size=hidden,
        expert_width=shape["expert_width"],
        expert_bytes={"bf16": 6 * hidden * shape["expert_width"]},
        other_bytes=2 * (layers * per_layer + shape["vocabulary"] * hidden),
        kv_bytes_per_token=4 * layers * hidden,
    )


def find_trace(run: MeasuredRun, folder: Path) -> Trace:
    """Return the trace that a run names: a path, also from `folder`, or a bundled recording. Raises InputError."""
    name = str(run.cell["trace"])
    for path in (folder / name, folder / Path(name).name, bundled().get(Path(name.removeprefix("bundled:")).stem)):
        if path is not None and path.is_file():
            return load_trace(path)
    raise InputError(f"'{run.name}' was measured on {name}, which is neither in {folder} nor bundled")


# ---- means -------------------------------------------------------------------------------------------------------


def _loop(run: MeasuredRun, steps: StepTimes, link_busy_ns: Ints) -> Loop:
    simulated = _tpot_of(run, steps)
    parts = {"compute": steps.compute, "wait": steps.wait, "host": steps.host, "link_busy": link_busy_ns}
    marked = run.marked
    marked = marked[marked["phase"] == 1]
    components = []
    if len(marked):
        total = float(marked["total_ns"].mean())
        places = marked["step"].to_numpy(np.int64)
        for name in COMPONENTS:
            measured, found = float(marked[f"{name}_ns"].mean()), float(parts[name][places].mean())
            components.append(Component(name, measured, found, (found - measured) / total))
    return Loop(simulated, simulated / _tpot(run) - 1, components)


def _tpot_of(run: MeasuredRun, steps: StepTimes) -> float:
    """Return the mean duration in `steps` of the steps that count for the run's TPOT, ns."""
    return float(steps.duration[_timed_decode(run)["step"].to_numpy(np.int64)].mean())


def _spread_ns(run: MeasuredRun) -> float:
    passes = np.array(run.pass_ns, float)
    if len(passes) < 2:
        return 0.0
    without_one = [np.delete(passes, number, axis=0).min(axis=0).mean() for number in range(len(passes))]
    return float(max(without_one) - passes.min(axis=0).mean())


def _median_tpot(run: MeasuredRun) -> float:
    return float(np.median(run.pass_ns, axis=0).mean()) if run.pass_ns else _tpot(run)


def _tpot(run: MeasuredRun) -> float:
    """Return the mean duration of the timed decode steps, ns."""
    return float(_timed_decode(run)["total_ns"].mean())


def _timed_decode(run: MeasuredRun) -> pd.DataFrame:
    """Return the timed decode steps. Raises InputError where there is none."""
    timed = run.timed
    decode = timed[timed["phase"] == 1]
    if not len(decode):
        raise InputError(f"'{run.name}' has no timed decode step")
    return decode
