"""Studies: every combination of the values of some settings, run on all cores, resumed wherever it was stopped.

Hydra composes each option of a group once; the points are then made by changing plain dicts, so that a study of thousands
of points costs no more than its simulations. A point has the configuration, the name and the key that ``foregate simulate``
would give it, and its row lies in the same store.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from joblib.externals.loky.process_executor import TerminatedWorkerError  # type: ignore[import-untyped]
from joblib.parallel import get_active_backend  # type: ignore[import-untyped]

from sim import store
from sim.budget import parse_budget
from sim.config import (
    Config,
    changes_system,
    check_config,
    compose_unnamed,
    groups,
    name_system,
    one_of,
    options,
    plain,
)
from sim.engines import ENGINES
from sim.experiment import composition_of, costs_of, key_of, simulate, trace_name, workload_of
from traces.atomic import write_atomically
from traces.errors import InputError, nearest

ALL = "all"
"""As the value of an axis that is a group: every option of it."""

Progress = Callable[[int, int, str], None]

_OF_A_STUDY = ("study", "axes", "baselines", "jobs")
_NOT_AN_AXIS = (*_OF_A_STUDY, "results", "plugins", "systems", "json", "experiment", "timeline", "timeline_steps")
_COMPACT_EVERY = 500
_FRUITLESS = 5
"""How often in a row workers may be killed without having finished anything, before we give up."""


class Point(NamedTuple):
    """One run of a study."""

    config: Config
    """As ``foregate simulate`` would compose it."""
    axes: dict[str, Any]
    """The value of every axis that applies to it."""
    key: str
    """Its row's name in the store."""


@dataclass(frozen=True)
class Study:
    """The points of a study, and why some of its combinations are none."""

    name: str
    results: str
    overrides: list[str]
    points: list[Point]
    jobs: int
    """Processes; -1 is one per core."""
    left_out: Sequence[str] = ()
    """A sentence for every system that the trace cannot serve."""


class Outcome(NamedTuple):
    """What running a study came to."""

    study: Study
    stored: int
    """Points whose row lies in the store, however it came there."""
    computed: int
    """Those that this run put there."""
    left_out: list[str]
    """A sentence for whatever could not run, each once."""


def run_study(
    overrides: Sequence[str] = (),
    *,
    config_dir: str | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Outcome:
    """Run every point of a study that is not stored yet.

    `overrides` are Hydra overrides of ``conf/sweep.yaml``, such as ``experiment=ranking``. `progress` is told (done, total,
    what) as points are done. A worker that is killed is replaced; points that cannot run (a budget too small for a system)
    are left out with a sentence. Raises InputError for bad input, before anything runs, and where no point can run.
    """
    study = plan(overrides, config_dir)
    write_study(study, {})
    computed, faults = run_points(study, study.points, progress)
    store.compact(study.results)
    if faults:
        write_study(study, faults)
    keys = {point.key for point in study.points}
    left_out = sorted({*study.left_out, *faults.values()})
    if len(faults) == len(keys):
        raise InputError(f"no point of the study could run: {left_out[0]}")
    return Outcome(study, len(keys) - len(faults), computed, left_out)


def plan(overrides: Sequence[str] = (), config_dir: str | None = None) -> Study:
    """Return the points of a study without running any; raises InputError where an axis or a value is wrong."""
    base = compose_unnamed("sweep", overrides, config_dir)
    check_config(base)
    one_of("engine", base["engine"], ENGINES)
    check_study(base)
    axes = axes_of(base, overrides, config_dir)
    points: dict[str, Point] = {}
    left_out: list[str] = []
    priced: set[tuple[int, ...]] = set()
    kept: list[Any] = []  # what `priced` knows by its address stays alive
    for config, values in _configs(base, axes, list(overrides), config_dir):
        check_config(config)
        parse_budget(config["budget"])
        workload = workload_of(config)
        what = (id(workload), id(config["hardware"]), id(config["model"]), id(config["link_gb_per_s"]))
        if what not in priced:
            costs_of(config, workload)  # refuses a model or machine that cannot be priced
            priced.add(what)
            kept.append((workload, config))
        composition = composition_of(config)
        try:
            composition.check(workload.trace.capabilities(), trace_name(config))
        except InputError as error:
            left_out.append(str(error))
            continue
        key = key_of(config, workload.trace)
        points.setdefault(key, Point(config, values, key))
    if not points:
        raise InputError(f"no point of the study can run: {left_out[0]}")
    study = Study(base["study"], base["results"], list(overrides), list(points.values()), base["jobs"])
    return replace(study, left_out=sorted(set(left_out)))


def check_study(base: Config) -> None:
    """Raise InputError where a study's name is no file's, its number of processes none, or a timeline is asked for."""
    name = base["study"]
    if not re.fullmatch(r"[\w+=.,-]+", name) or name.startswith("."):
        raise InputError(f"study is '{name}': it names a file and is made of letters, digits, '_', '-', '+', '=' and '.'")
    workers(base["jobs"], 1)
    if base["timeline"] is not None:
        raise InputError("timeline: only of one run, foregate simulate ... timeline=NAME.json.gz")


# ---- what a study on disk says -----------------------------------------------------------------------------------


def read_study(results: str | os.PathLike[str], name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the stored rows of a study, in its order, with a column for every axis that the store has no column for.

    An axis that does not apply to a row (a baseline's) is None there. `columns` as in `sim.store.read_rows`. Raises
    InputError where the study is unknown or none of its rows is stored.
    """
    points = _read(results, name)["points"]
    stored = store.stored_keys(results)
    keys = [key for key in points if key in stored]
    if not keys:
        raise InputError(f"{results}: no result of the study '{name}' is stored: `foregate sweep` makes them")
    wanted = None if columns is None else [*columns, *({"key"} - set(columns))]
    rows = store.read_rows(results, keys, columns=wanted)
    axes = dict.fromkeys(axis for values in points.values() for axis in values)
    for axis in axes:
        if axis not in store.SCHEMA.names:
            rows[axis] = pd.Series([points[key].get(axis) for key in rows["key"]], index=rows.index, dtype=object)
    return rows


class Status(NamedTuple):
    """How far a study is."""

    name: str
    points: int
    stored: int
    cannot_run: dict[str, str]
    """Key to sentence."""
    missing: list[dict[str, Any]]
    """The axes of the points that are neither."""


def status(results: str | os.PathLike[str]) -> list[Status]:
    """Return how far every study in `results` is, by name."""
    stored = store.stored_keys(results)
    found = []
    for path in sorted((Path(results) / "studies").glob("[!.]*.json")):
        study = _read(results, path.stem)
        points = study["points"]
        cannot = {key: why for key, why in study["cannot_run"].items() if key not in stored}
        missing = [axes for key, axes in points.items() if key not in stored and key not in cannot]
        found.append(Status(path.stem, len(points), len(stored & set(points)), cannot, missing))
    return found


def _file(results: str | os.PathLike[str], name: str) -> Path:
    return Path(results) / "studies" / f"{name}.json"


def write_study(study: Study, faults: Mapping[str, str]) -> None:
    """Write down which rows a study consists of, and which of them cannot be."""
    content = {
        "study": study.name,
        "overrides": study.overrides,
        "points": {point.key: point.axes for point in study.points},
        "cannot_run": dict(sorted(faults.items())),
    }
    write_atomically(_file(study.results, study.name), (json.dumps(content, indent=1) + "\n").encode())


def _read(results: str | os.PathLike[str], name: str) -> Any:
    path = _file(results, name)
    if not path.is_file():
        known = [each.stem for each in path.parent.glob("[!.]*.json")]
        raise InputError(f"{path}: there is no such study: {nearest(name, known) if known else 'none was run yet'}")
    try:
        found = json.loads(path.read_text())
        assert isinstance(found["points"], dict)
        assert isinstance(found["cannot_run"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{path}: not the list of a study's points; delete it and sweep again") from error
    return found


# ---- axes and points ---------------------------------------------------------------------------------------------


def axes_of(base: Config, overrides: Sequence[str], config_dir: str | None) -> dict[str, list[Any]]:
    """Return the values of every axis, by the name of its setting, in the order of the file."""
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    axes: dict[str, list[Any]] = {}
    for name, values in flat(base["axes"]):
        where = f"axes.{name}"
        group = name.partition(".")[0]
        if group not in base or name in _NOT_AN_AXIS:
            raise InputError(f"{where}: '{group}' is no setting of a run: {nearest(group, set(base) - set(_NOT_AN_AXIS))}")
        if name in given:
            raise InputError(f"{name} is an axis of this study: change its values with {where}=[...]")
        if values == ALL and name in groups():
            values = options(name, config_dir)
        if not isinstance(values, list):
            raise InputError(f"{where} is {values!r}: it must be a list of values, such as [{values}]")
        if not values:
            raise InputError(f"{where} is empty: name at least one value, or take the axis out with ~{where}")
        if name in groups():
            for value in values:
                is_path = name == "trace" and isinstance(value, str) and ("/" in value or value.endswith(".safetensors"))
                if not is_path:
                    one_of(where, value, options(name, config_dir))
        axes[name] = values
    if not axes:
        raise InputError("axes is empty: choose an experiment=NAME, or name an axis, such as axes.system=[lru,fate]")
    return axes


def flat(axes: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Give every axis with its dotted name; ``prefetch: {depth: [1]}`` is ``prefetch.depth: [1]``."""
    for name, values in axes.items():
        if isinstance(values, Mapping) and values:
            yield from flat(values, f"{path}{name}.")
        else:
            yield f"{path}{name}", values


def _configs(
    base: Config, axes: dict[str, list[Any]], overrides: list[str], config_dir: str | None
) -> Iterator[tuple[Config, dict[str, Any]]]:
    """Give the configuration of every point and the values of its axes; the last axis changes fastest."""
    own = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in _OF_A_STUDY]
    chosen = [name for name in axes if name in groups()]
    changed = [name for name in axes if name not in groups()]
    parts = [name for name in chosen if name == "system" or changes_system(name)]  # one may change what another chose
    others = [name for name in chosen if name not in parts]
    options_of = {
        (name, option): compose_unnamed("sweep", [*own, f"{name}={option}"], config_dir)[name]
        for name in others
        for option in axes[name]
    }

    def made(system_words: list[str], names: list[str]) -> Iterator[tuple[Config, dict[str, Any]]]:
        chosen_anew = compose_unnamed("sweep", [*own, *system_words], config_dir) if system_words else base
        composed = plain(chosen_anew, without=_OF_A_STUDY)
        check_config(composed)
        system = composed["system"].get("name")
        of_system = dict(word.split("=", 1) for word in system_words)
        for values in product(*(axes[name] for name in names)):
            config, settings = dict(composed), dict(zip(names, values, strict=True))
            for name in others:
                config[name] = options_of[name, settings[name]]
            for name in changed:
                if name in settings:
                    config = with_value(config, name.split("."), settings[name], f"axes.{name}", system)
            for name in ("system", "hardware"):
                config[name] = dict(config[name])
            changes = [f"{name}={as_word(value)}" for name, value in settings.items()]
            name_system(config, [*own, *system_words, *changes])
            yield config, {name: of_system.get(name, settings.get(name)) for name in axes if name in of_system | settings}

    for combination in product(*(axes[name] for name in parts)):
        words = [f"{name}={option}" for name, option in zip(parts, combination, strict=True)]
        yield from made(words, [name for name in axes if name not in parts])
    for name in base["baselines"]:
        one_of("baselines", name, options("system", config_dir))
        yield from made([f"system={name}"], [name for name in axes if name != "system" and not changes_system(name)])


def with_value(config: Config, path: list[str], value: Any, where: str, system: Any) -> Config:
    """Return a copy of `config` in which the setting at `path` has another value; what is not on the path is shared.

    Raises InputError, which calls the value `where`, unless the configuration of `system` has that setting.
    """
    name, *rest = path
    if name not in config or (rest and not isinstance(config[name], Mapping)):
        known = [str(key) for key in config if key != "_target_"]
        raise InputError(
            f"{where}: system '{system}' has no such setting: {nearest(name, known) if known else 'it takes no parameters'}"
        )
    if not rest and isinstance(config[name], Mapping) and not isinstance(value, Mapping):
        raise InputError(f"{where} holds {value!r}, but it is a group of settings: {', '.join(config[name])}")
    return {**config, name: with_value(config[name], rest, value, where, system) if rest else value}


def as_word(value: Any) -> str:
    """Return a value as one writes it in an override."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- running -----------------------------------------------------------------------------------------------------


def run_points(study: Study, points: Sequence[Point], progress: Progress) -> tuple[int, dict[str, str]]:
    """Run those of the points that are not stored; return how many ran, and why the others cannot, by key.

    A worker that is killed is replaced, and what it had not stored runs again.
    """
    stored = store.stored_keys(study.results)
    todo = {point.key: point for point in points if point.key not in stored}
    faults: dict[str, str] = {}
    computed = fruitless = 0
    while todo:
        before = len(todo)
        try:
            for batch in _results(list(todo.values()), study.jobs):
                for key, what, fault in batch:
                    del todo[key]
                    if fault is None:
                        computed += 1
                    else:
                        faults[key] = fault
                    progress(len(points) - len(todo), len(points), what)
                    if fault is None and computed % _COMPACT_EVERY == 0:
                        store.compact(study.results)
        except TerminatedWorkerError as error:
            stored = store.stored_keys(study.results)
            for key in [key for key in todo if key in stored]:
                del todo[key]
                computed += 1
            fruitless = fruitless + 1 if len(todo) == before else 0
            if fruitless == _FRUITLESS:
                raise InputError(
                    f"workers were killed {_FRUITLESS} times before they finished a point ({len(todo)} of {len(points)} are "
                    "left): is there enough memory? finished results are kept, the same command goes on; jobs=1 needs least"
                ) from error
    return computed, faults


def _results(points: list[Point], jobs: int) -> Iterator[list[tuple[str, str, str | None]]]:
    """Run points in batches, in as many processes as there is work for; give what came of each batch."""
    count = workers(jobs, len(points))
    # Neighbours share the system, whose compiled code a worker loads once; many small batches even out the end.
    size = max(1, min(25, len(points) // (8 * count)))
    batches = [[(p.key, p.config) for p in points[start : start + size]] for start in range(0, len(points), size)]
    if count == 1:
        # One by one, so that progress is seen.
        return ([_run(key, config)] for batch in batches for key, config in batch)
    pool = Parallel(n_jobs=count, return_as="generator_unordered", inner_max_num_threads=1)
    results: Iterator[list[tuple[str, str, str | None]]] = pool(delayed(_run_batch)(os.getcwd(), batch) for batch in batches)
    return results


def _run_batch(folder: str, batch: list[tuple[str, Config]]) -> list[tuple[str, str, str | None]]:
    os.chdir(folder)  # a worker that was there before is where it was started
    return [_run(key, config) for key, config in batch]


def _run(key: str, config: Config) -> tuple[str, str, str | None]:
    """Run one point; return its key, what it is and, if it cannot run, why."""
    what = f"{config['system']['name']} at {config['budget']}"
    try:
        simulate(config)
    except InputError as error:
        return key, what, str(error)
    return key, what, None


def workers(jobs: Any, tasks: int) -> int:
    """Return how many processes to use for so many tasks; one where we already are one of joblib's."""
    if type(jobs) is not int or jobs == 0 or jobs < -1:
        raise InputError(f"jobs is {jobs!r}: it must be a number of processes, or -1 for one per core")
    if get_active_backend()[0].nesting_level:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores if jobs == -1 else jobs, tasks))
