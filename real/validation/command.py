"""The command ``foregate validate``: measured runs, from this machine's GPU or from files, beside their simulation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from real.driver import STAND_IN
from real.validation.comparison import (
    CellReport,
    compare_cell,
    find_trace,
    in_order,
    of_bound,
    ranking,
    simulated_spans,
    summary,
)
from real.validation.measured import SHOWN_STEPS, MeasuredRun, from_replay, read_folder, replay_results, write_measured
from sim import store
from sim.config import Config, check_config, check_types, compose_config, groups
from sim.experiment import workload_of
from sim.hardware import Hardware, make_hardware, model_spec
from sim.timeline import Recording, write_timeline
from sim.workload import make_workload
from traces import Trace, load_trace, save_trace
from traces.atomic import write_atomically
from traces.errors import InputError

OWN = ("runs", "cells", "timeline", "json")
"""Settings of this command, beside those of a simulation."""

GROUND_TRUTH = Path(__file__).parents[1] / "ground_truth"
"""Committed measurements: a folder per GPU with runs, ``hardware.json`` (the resolved profile) and ``summary.json``."""

Run = tuple[MeasuredRun, Trace]


def validate(overrides: Sequence[str] = (), config_dir: str | None = None) -> tuple[list[CellReport], Hardware, Path]:
    """Compare measured runs with the simulation; return reports, anchors first, the profile, and the timeline's file.

    `overrides` are Hydra overrides of ``conf/validate.yaml``. With ``runs=FOLDER`` those runs are compared; without, the
    system is run on this machine's GPU after the three anchors, and the runs are kept under results; without a GPU the
    committed ground truth is compared. A folder that holds its own ``hardware.json`` is simulated on that profile, unless
    `overrides` choose another. ``system=winner`` is the fastest stored result on the trace. Raises InputError, also for
    overrides that stored runs would leave without effect.
    """
    _refuse_without_effect(overrides)
    given = list(overrides)
    overrides = resolve_winner(list(overrides), config_dir)
    config = compose_config("validate", overrides, config_dir)
    check_config({name: value for name, value in config.items() if name not in OWN})
    check_types(config)
    if config["link_gb_per_s"] is not None:
        raise InputError("link_gb_per_s: a run is measured, and simulated, on the link that its machine has; leave it null")
    results = Path(config["results"]) / "validation"
    folder = _ground_truth(_of_what_would_run(given)) if config["runs"] is None and not _has_gpu() else config["runs"]
    runs = _measure(config, overrides, config_dir, results) if folder is None else _stored(Path(folder), config["cells"])
    chosen = any(override.startswith("hardware") for override in overrides)
    own = None if folder is None or chosen else Path(folder) / "hardware.json"
    hardware = make_hardware(config["hardware"] if own is None or not own.is_file() else read_json(own))
    if any(run.device == STAND_IN for run, _ in runs):
        _say(f"these runs were made by the {STAND_IN}, which times nothing: their times, and errors of them, mean nothing")
    reports = in_order([compare_cell(run, trace, hardware) for run, trace in runs])
    timeline = Path(config["timeline"] or results / "timeline.json.gz")
    _write_timeline(timeline, reports[-1], *next(each for each in runs if each[0].name == reports[-1].name), hardware)
    return reports, hardware, timeline


def _refuse_without_effect(overrides: Sequence[str]) -> None:
    """Raise InputError for ``cells`` without stored runs, and with them for overrides of what would run instead."""
    given = {_setting_of(override): override for override in overrides}
    if given.get("runs", "runs=null") == "runs=null":
        if given.get("cells", "cells=null") != "cells=null":
            raise InputError("cells: they belong to results of real.replay; give the folder of those too: runs=FOLDER")
        return
    for override in _of_what_would_run(overrides):
        raise InputError(f"{override}: with runs=FOLDER what was run is compared, and this would change nothing of it")


def _of_what_would_run(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that say what is to be run, and nothing about what was run before."""
    without = {*groups(), *compose_config("validate", [])} - {*OWN, "results", "hardware", "link_gb_per_s"}
    return [override for override in overrides if _setting_of(override) in without]


def _setting_of(override: str) -> str:
    """Return the group or the setting that a Hydra override changes."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


def resolve_winner(overrides: list[str], config_dir: str | None = None) -> list[str]:
    """Write ``system=winner`` out as the fastest stored system on the trace, ceilings left out. Raises InputError."""
    if "system=winner" not in overrides:
        return overrides
    others = [override for override in overrides if override != "system=winner"]
    config = compose_config("validate", others, config_dir)
    rows = store.read_rows(config["results"])
    trace_hash = workload_of(config).trace.hash
    rows = rows[(rows["trace_hash"] == trace_hash) & ~rows["ceiling"]]
    if any(override.startswith("budget=") for override in others):
        rows = rows[[json.loads(row)["budget"] == config["budget"] for row in rows["config"]]]
    if rows.empty:
        raise InputError(
            f"system=winner: {config['results']} holds no result on this trace and budget: `foregate compare` makes one"
        )
    best = rows.sort_values("tokens_per_s").iloc[-1]
    name, *changes = str(best["system"]).split("+")
    stored = json.loads(best["config"])
    budget = [] if any(override.startswith("budget=") for override in others) else [f"budget={stored['budget']}"]
    return [*others, f"system={name}", *changes, *budget]


# ---- runs --------------------------------------------------------------------------------------------------------


def _ground_truth(in_vain: Sequence[str]) -> Path:
    """Return the first folder of committed measurements, and say so, and which overrides are `in_vain`.

    Raises InputError where there is none.
    """
    folders = sorted(path.parent for path in GROUND_TRUTH.glob("*/summary.json"))
    if not folders:
        raise InputError(
            "there is no GPU that torch can use: give runs=FOLDER of measured runs (no measurements are committed yet)"
        )
    others = ", ".join(f"runs={folder}" for folder in folders[1:])
    _say(
        f"there is no GPU that torch can use: the measurements in {folders[0]} are compared"
        + (f"; or {others}" * bool(others))
        + (f"; nothing was run, so {', '.join(in_vain)} changed nothing" * bool(in_vain))
    )
    return folders[0]


def _stored(folder: Path, cells_file: str | None) -> list[Run]:
    """Read measured runs, or results of the executor, from a folder."""
    if not folder.is_dir():
        raise InputError(f"runs is '{folder}': there is no such folder")
    if not (folder / "results.jsonl").is_file():
        if cells_file is not None:
            raise InputError(f"cells is '{cells_file}', but {folder} holds no results of real.replay (results.jsonl)")
        within = [path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_runs(path)]
        if within and not _holds_runs(folder):
            raise InputError(f"{folder}: there is no measured run, but in {', '.join(f'runs={path}' for path in within)}")
        return [(run, find_trace(run, folder)) for run in read_folder(folder)]
    from real.replay import read_cells

    path = Path(cells_file or folder / "cells.json")
    if not path.is_file():
        raise InputError(f"cells: there is no file {path}; name the cells.json that was run")
    cells = {cell.name: asdict(cell) for cell in read_cells(path)}
    runs = []
    for row, log, times in replay_results(folder):
        if row["cell"] not in cells:
            raise InputError(f"{path}: there is no cell '{row['cell']}', but a result of it")
        runs.append(_as_run(cells[row["cell"]], row, log, times))
    return runs


def _holds_runs(folder: Path) -> bool:
    return (folder / "results.jsonl").is_file() or any(folder.glob("*.parquet"))


def _as_run(cell: dict[str, Any], row: dict[str, Any], log: Any, times: dict[str, Any]) -> Run:
    trace = load_trace(cell["trace"])
    decode = make_workload(trace, **cell["workload"]).decode
    return from_replay({**cell, "trace": Path(cell["trace"]).name}, row, log, decode, trace.hash, times), trace


def _measure(
    config: Config, overrides: Sequence[str], config_dir: str | None, results: Path, where: str = "cuda"
) -> list[Run]:
    """Run the three anchors and the config's system on the GPU, passes in turn, and keep the runs.

    Raises InputError where a cell failed in a pass; the others are kept.
    """
    if config_dir is not None:
        raise InputError("--config-dir: cells for the GPU are made from the options of foregate's own conf/ only")
    from real.replay import Model, Passes, merged, times_of

    results.mkdir(parents=True, exist_ok=True)
    cells = _cells(config, overrides, results.resolve())
    passes = Passes(cells)
    model = Model(cells[0].shape, where)
    runs = []
    try:
        passes.run(model, _say)
    finally:  # also when it was interrupted: what ran is kept
        model.close()
        for cell in cells:
            if cell.name not in passes.failed and passes.done[cell.name]:
                measured = merged(passes.done[cell.name])
                runs.append(_as_run(asdict(cell), measured.row, measured.log, times_of(measured.timeline)))
                write_measured(results, runs[-1][0])
    if passes.failed:
        raise InputError("; ".join(f"'{name}' failed in {why}" for name, why in passes.failed.items()))
    return runs


def _cells(config: Config, overrides: Sequence[str], folder: Path) -> list[Any]:
    """Return the cells of the three anchors and of the config's system, on its trace in the model's shape."""
    from real.cells import fit_routing, make_cell

    trace = workload_of(config).trace
    spec = model_spec(config["model"], trace.model)
    if (trace.model.layers, trace.model.experts, trace.model.top_k) != (spec.layers, spec.experts, spec.top_k):
        trace = fit_routing(trace, spec)
    path = folder / "routing.safetensors"
    save_trace(trace, path)
    left_out = ("trace", "system", "budget", *OWN)
    common = [o for o in overrides if o.partition("=")[0].partition(".")[0] not in left_out]
    parts = [o for o in common if o.partition("=")[0].partition(".")[0] not in _RUN_SETTINGS]
    settings = [o for o in common if o not in parts]
    settings += [f"trace={path}", f"budget={config['budget']}", f"results={config['results']}"]
    system = next((o for o in overrides if o.startswith("system=")), "system=lru")
    made = [
        make_cell("all resident", [*settings, "system=lru"], folder, slots=spec.layers * spec.experts, preload=True),
        make_cell("all missing", [*settings, "system=load_on_demand"], folder),
        make_cell("perfect prefetch", [*settings, "system=clairvoyant"], folder),
        make_cell(config["system"]["name"], [*settings, system, *parts], folder),
    ]
    return [replace(cell, trace=str(path)) for cell in made]


_RUN_SETTINGS = ("workload", "hardware", "model", "precision", "seed", "engine", "results")
"""Overrides that concern the anchors too; the others make the system."""


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


# ---- what comes out ----------------------------------------------------------------------------------------------


def _write_timeline(path: Path, report: CellReport, run: MeasuredRun, trace: Trace, hardware: Hardware) -> None:
    """Write four steps of the report's two runs side by side."""
    model, last = run.cell["model"], int(run.steps["step"].max()) + 1
    names = (f"measured: {report.name}", f"simulated: {report.name}")
    spans = run.spans, simulated_spans(run, trace, hardware)
    runs = dict(zip(names, map(Recording, report.logs, spans), strict=True))
    write_timeline(path, runs, model["layers"], model["experts"], range(max(0, last - SHOWN_STEPS), last))


def print_reports(out: Console, reports: Sequence[CellReport], hardware: Hardware) -> None:
    """Print a table of all cells, anchors first, and what they add up to."""
    table = Table(title=f"simulation against measurement, hardware {hardware.name} ({hardware.tags()})")
    table.add_column("cell")
    for column in ("measured ms", "closed", "open", *(f"{name} (open)" for name in ("compute", "wait", "host", "link"))):
        table.add_column(column, justify="right")
    table.add_column("decisions differ", justify="right")
    for report in reports:
        parts = [f"{part.error:+.1%}" for part in report.open_loop.components] or ["-"] * 4
        differ = report.divergence
        decisions = f"{differ.differing / differ.events:.1%}" + (f", first {differ.first}" if differ.differing else "")
        table.add_row(
            f"{report.name} (anchor)" if report.anchor else report.name,
            f"{report.measured_tpot_ns / 1e6:.3f}",
            f"{report.closed_loop.error:+.1%}",
            f"{report.open_loop.error:+.1%}",
            *parts,
            decisions,
        )
    out.print(table)
    found = summary(reports)
    ranks = ranking(reports)
    tau = "-" if ranks.tau_of_all is None else f"{ranks.tau_of_all:.2f}"
    apart = "" if ranks.tau is None else f"{ranks.tau:.2f}"
    too_close = f", {apart} without the {ranks.too_close} too close to tell apart" if ranks.too_close else ""
    out.print(
        f"closed loop: mean error {found['mean_error']:.1%}, worst {found['worst_error']:.1%}; ranking agreement (Kendall "
        f"tau) {tau} over {ranks.pairs + ranks.too_close} pairs{too_close}. "
        "Errors are (simulated - measured) / measured step.",
        highlight=False,
        soft_wrap=True,
    )


def reports_dict(reports: Sequence[CellReport]) -> dict[str, Any]:
    """Return everything but the logs as JSON values."""
    cells = []
    for report in reports:
        fields = report._asdict()
        del fields["logs"]
        for name in ("open_loop", "closed_loop"):
            loop = fields[name]
            fields[name] = {**loop._asdict(), "components": [part._asdict() for part in loop.components]}
        cells.append({**fields, "divergence": report.divergence._asdict()})
    return {"reports": cells, **summary(reports)}


# ---- ground truth ------------------------------------------------------------------------------------------------


def write_ground_truth(
    folder: str | os.PathLike[str],
    runs: Sequence[Run],
    profile: dict[str, Any],
    over_best_peer: float | None = None,
) -> dict[str, Any]:
    """Write runs, their traces, the resolved hardware `profile` and the summary into `folder`; return the summary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hardware = make_hardware(profile)
    for run, trace in runs:
        write_measured(folder, run)
        save_trace(trace, folder / Path(run.cell["trace"]).name)
    reports = in_order([compare_cell(run, trace, hardware) for run, trace in runs])
    found = {"hardware": hardware.name, **summary(reports, over_best_peer, of_bound([run for run, _ in runs]))}
    write_atomically(folder / "hardware.json", json.dumps(profile, indent=1).encode())
    write_atomically(folder / "summary.json", json.dumps(found, indent=1, allow_nan=False).encode())
    return found


def ground_truth() -> list[tuple[str, dict[str, Any]]]:
    """Return the committed summaries, each with the machine that was measured. Raises InputError where one is damaged."""
    return [(path.parent.name, read_json(path)) for path in sorted(GROUND_TRUTH.glob("*/summary.json"))]


def check_ground_truth(folder: Path) -> list[str]:
    """Simulate every stored cell again and return a sentence for each figure of the summary that has changed since.

    Raises InputError where the folder is not whole.
    """
    stored = read_json(folder / "summary.json")
    hardware = make_hardware(read_json(folder / "hardware.json"))
    runs = read_folder(folder)
    reports = in_order([compare_cell(run, find_trace(run, folder), hardware) for run in runs])
    now = json.loads(json.dumps(summary(reports, _over_best_peer(folder, stored), of_bound(runs))))
    before = {cell["name"]: cell for cell in stored.pop("cells")}
    drifted = []
    for cell in now.pop("cells"):
        then = before.pop(cell["name"], None)
        if then is None:
            raise InputError(f"{folder}: summary.json does not know the run '{cell['name']}'")
        drifted += [
            f"'{cell['name']}': {field} was {then.get(field)} and is {is_now}"
            for field, is_now in cell.items()
            if then.get(field) != is_now
        ]
    if before:
        raise InputError(f"{folder}: the runs of {', '.join(map(repr, before))} are missing")
    now["hardware"] = hardware.name
    return drifted + [
        f"{field} was {stored.get(field)} and is {now.get(field)}"
        for field in {**stored, **now}
        if stored.get(field) != now.get(field)
    ]


def _over_best_peer(folder: Path, stored: dict[str, Any]) -> Any:
    """Return the least of the ratios to the best peer in ``peers.json``, if that is there."""
    if not (folder / "peers.json").is_file():
        return stored.get("over_best_peer")
    return min(each["ratio"] for each in read_json(folder / "peers.json")["over_best_peer"].values())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a mapping")
    return found
