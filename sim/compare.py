"""The main job: every system on one trace, at equal memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from sim import store
from sim.budget import parse_budget
from sim.config import Config, check_config, compose_config, one_of, options
from sim.engines import ENGINES
from sim.experiment import composition_of, costs_of, key_of, trace_name, workload_of
from sim.study import Point, Study, run_points, workers
from traces.errors import InputError


def compare(
    overrides: Sequence[str] = (),
    *,
    config_dir: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[pd.DataFrame, list[str]]:
    """Run all systems at all budgets and return their rows, and a sentence for each that could not run.

    `overrides` are Hydra overrides of ``conf/compare.yaml``. Rows that are stored already are not run again, so an
    interrupted comparison goes on where it was. `progress` is told (done, total, what) after every run. A system that the
    trace or a budget cannot serve is left out with a sentence; raises InputError where none can run, and for bad input.
    """
    base = compose_config("compare", overrides, config_dir)
    check_config(base)
    one_of("engine", base["engine"], ENGINES)
    workers(base["jobs"], 1)  # refuses what is no number of processes before anything runs
    configs, left_out = _plan(base, overrides, config_dir)
    workload = workload_of(base)
    costs_of(base, workload)  # refuses a model or machine that cannot be priced before anything runs
    points = [Point(config, {}, key_of(config, workload.trace)) for config in configs]
    _, faults = run_points(Study("compare", base["results"], list(overrides), points, base["jobs"]), points, progress)
    left_out += faults.values()
    stored = [point.key for point in points if point.key not in faults]
    if not stored:
        why = f"no system could run: {left_out[0]}" if left_out else "systems or budget is empty: name at least one"
        raise InputError(why)
    return store.read_rows(base["results"], stored), sorted(set(left_out))


def _plan(base: Config, overrides: Sequence[str], config_dir: str | None) -> tuple[list[Config], list[str]]:
    """Return one config per system and budget, and a sentence for each system that the trace cannot serve."""
    known = options("system", config_dir)
    if any(override.partition("=")[0] == "system" for override in overrides):
        raise InputError("system=NAME chooses one system, but a comparison takes several: systems=[NAME,NAME]")
    systems = known if base["systems"] is None else _as_list(base["systems"])
    budgets = _as_list(base["budget"])
    for budget in budgets:
        parse_budget(budget)
    own = [override for override in overrides if override.partition("=")[0] not in ("systems", "budget")]
    capabilities = workload_of(base).trace.capabilities()
    configs, left_out = [], []
    for name in systems:
        one_of("systems", name, known)
        config = compose_config("compare", [*own, f"system={name}"], config_dir)
        try:
            composition_of(config).check(capabilities, trace_name(config))
        except InputError as error:
            left_out.append(str(error))
            continue
        configs += [{**config, "budget": budget} for budget in budgets]
    return configs, left_out


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
