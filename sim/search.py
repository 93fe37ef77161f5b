"""Search: parameters of a system's parts, tuned on some requests and reported on others.

Optuna proposes, the store remembers. What it proposes depends on the seed and on the results so far only, so the same
command proposes the same again: a search that was killed reads its finished trials back and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sim import store
from sim.bootstrap import Comparison, compare_speed
from sim.budget import parse_budget
from sim.config import Config, check_config, compose_unnamed, name_system, plain
from sim.experiment import REQUESTS, composition_of, costs_of, key_of, trace_name, workload_of
from sim.study import Point, Progress, Study, as_word, check_study, run_points, with_value, write_study
from traces.errors import InputError, nearest

if TYPE_CHECKING:
    import optuna

_OF_A_SEARCH = ("study", "space", "trials", "at_once", "jobs")
_TUNING, _HELD_OUT = REQUESTS


class Found(NamedTuple):
    """What a search found, beside the parameters that the system had before."""

    study: Study
    system: str
    before: dict[str, Any]
    after: dict[str, Any]
    """Value of every parameter: of the fastest trial on the requests of the tuning."""
    tuning: Comparison
    """Speed after over speed before, on the requests that the search saw: it flatters."""
    held_out: Comparison
    """The same on the requests that it never saw."""
    trials: int
    failed: list[str]
    """A sentence for whatever could not run, each once."""

    @property
    def gap(self) -> float:
        """How much of the gain on the tuning's requests the others do not show, in points of the speed before."""
        return self.tuning.ratio - self.held_out.ratio


def search(
    overrides: Sequence[str] = (),
    *,
    config_dir: str | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Found:
    """Search the parameters with most tokens/s on one half of the requests, and report the other half's.

    `overrides` are Hydra overrides of ``conf/search.yaml``. The first trial has the parameters as they were. All rows lie
    in the store, those of the two halves under ``TRACE+requests=tuning`` and ``TRACE+requests=held_out``. `progress` is
    told (done, total, what) after every batch of trials. Raises InputError for bad input, and where no trial can run.
    """
    base, space, own = _settings(overrides, config_dir)
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler
    trials = optuna.create_study(direction="maximize")
    study = Study(base["study"], base["results"], list(overrides), [], base["jobs"])
    speeds: dict[str, float] = {}
    faults: dict[str, str] = {}
    tried: list[Point] = []
    while len(tried) < base["trials"]:
        batch: list[tuple[Any, Point]] = []
        for number in range(len(tried), min(len(tried) + base["at_once"], base["trials"])):
            if number == 0:
                batch.append((None, _point(base, {}, own, _TUNING)))
                continue
            trials.sampler = sampler(seed=base["seed"] * 1_000_003 + number, constant_liar=True)
            trial = trials.ask()
            batch.append((trial, _point(base, {name: _suggest(trial, name, space[name]) for name in space}, own, _TUNING)))
        tried += [point for _, point in batch]
        study = replace(study, points=_distinct(tried))
        write_study(study, faults)
        faults |= run_points(study, [point for _, point in batch], lambda done, total, what: None)[1]
        speeds |= _speeds(study.results, [point for _, point in batch if point.key not in faults])
        for trial, point in batch:
            if trial is not None:
                failed = optuna.trial.TrialState.FAIL if point.key in faults else None
                trials.tell(trial, speeds.get(point.key), state=failed)
        progress(len(tried), base["trials"], _words(tried[-1].axes))
    if tried[0].key in faults:
        raise InputError(faults[tried[0].key])
    best = max((point for point in tried if point.key in speeds), key=lambda point: speeds[point.key])
    before, after = (_values(point, space) for point in (tried[0], best))
    others = [_point(base, values, own, _HELD_OUT) for values in ({}, {} if best.key == tried[0].key else after)]
    study = replace(study, points=_distinct([*tried, *others]))
    write_study(study, faults)
    faults |= run_points(study, others, lambda done, total, what: None)[1]
    store.compact(study.results)
    write_study(study, faults)
    for point in others:
        if point.key in faults:
            raise InputError(f"on the requests held out: {faults[point.key]}")
    tuning, held_out = (_compare(study.results, *pair) for pair in ((best, tried[0]), (others[1], others[0])))
    return Found(study, base["system"]["name"], before, after, tuning, held_out, len(tried), sorted(set(faults.values())))


def _settings(overrides: Sequence[str], config_dir: str | None) -> tuple[Config, dict[str, Any], list[str]]:
    """Return the checked configuration, the flat space, and the overrides that are a run's."""
    base = compose_unnamed("search", overrides, config_dir)
    check_config(base)
    check_study(base)
    parse_budget(base["budget"])
    if base["trace"].get("requests") is not None:
        raise InputError("trace.requests is the search's own: it tunes on one half and reports on the other")
    space = dict(flat_space(base["space"]))
    if not space:
        raise InputError("space is empty: choose experiment=tuning, or name a parameter: space.prefetch.depth=[1,2,3]")
    for name, choice in space.items():
        _check_choice(f"space.{name}", choice)
    own = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in _OF_A_SEARCH]
    for name, choice in space.items():
        if name in {word.lstrip("+~").partition("=")[0] for word in own}:
            raise InputError(f"{name} is searched: change where with space.{name}=...")
        for value in choice if isinstance(choice, list) else (choice["low"], choice["high"]):
            config = _config(base, {name: value}, own, _TUNING)  # refuses what is no parameter, or of the wrong type
            check_config(config)
            composition_of(config).check(workload_of(config).trace.capabilities(), trace_name(config))
    costs_of(base, workload_of(base))
    return base, space, own


def flat_space(space: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return every parameter with its dotted name and where to search it: a list, or a mapping with low and high."""
    found = []
    for name, choice in space.items():
        if isinstance(choice, Mapping) and choice and not {"low", "high"} & set(choice):
            found += [(f"{name}.{rest}", inner) for rest, inner in flat_space(choice)]
        else:
            found.append((str(name), choice))
    return found


def _check_choice(where: str, choice: Any) -> None:
    if isinstance(choice, list):
        if not choice:
            raise InputError(f"{where} is empty: name at least one value")
        return
    if not isinstance(choice, Mapping):
        raise InputError(f"{where} is {choice!r}: it must be a list of values, or {{low: NUMBER, high: NUMBER}}")
    for name in choice:
        if name not in ("low", "high", "log"):
            raise InputError(f"{where} has no field '{name}': {nearest(str(name), ('low', 'high', 'log'))}")
    low, high, log = choice.get("low"), choice.get("high"), choice.get("log", False)
    if any(type(end) not in (int, float) for end in (low, high)) or not low < high:  # type: ignore[operator]
        raise InputError(f"{where} is {dict(choice)}: low and high must be numbers, and low the smaller one")
    if type(log) is not bool or (log and not low > 0):  # type: ignore[operator]
        raise InputError(f"{where}.log is {log!r}: it must be true or false, and low above 0 where it is true")


def _suggest(trial: optuna.Trial, name: str, choice: Any) -> Any:
    if isinstance(choice, list):
        return choice[trial.suggest_int(name, 0, len(choice) - 1)]
    low, high, log = choice["low"], choice["high"], choice.get("log", False)
    if type(low) is int and type(high) is int:
        return trial.suggest_int(name, low, high, log=log)
    return float(f"{trial.suggest_float(name, low, high, log=log):.4g}")


def _config(base: Config, values: Mapping[str, Any], own: Sequence[str], requests: str) -> Config:
    """Return the configuration of a run with these parameters, named as ``foregate simulate`` would."""
    config = plain(base, without=_OF_A_SEARCH)
    for name, value in values.items():
        config = with_value(config, name.split("."), value, f"space.{name}", base["system"].get("name"))
    config["trace"] = {**config["trace"], "requests": requests}
    for name in ("system", "hardware"):
        config[name] = dict(config[name])
    name_system(config, [*own, *(f"{name}={as_word(value)}" for name, value in values.items())])
    return config


def _point(base: Config, values: dict[str, Any], own: Sequence[str], requests: str) -> Point:
    config = _config(base, values, own, requests)
    return Point(config, {**values, "trace.requests": requests}, key_of(config, workload_of(config).trace))


def _distinct(points: Sequence[Point]) -> list[Point]:
    return list({point.key: point for point in points}.values())


def _values(point: Point, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value that each parameter has in a point."""
    found = {}
    for name in space:
        value: Any = point.config
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found


def _speeds(results: str, points: Sequence[Point]) -> dict[str, float]:
    if not points:
        return {}
    rows = store.read_rows(results, [point.key for point in points], columns=["key", "tokens_per_s"])
    return dict(zip(rows["key"], rows["tokens_per_s"], strict=True))


def _compare(results: str, after: Point, before: Point) -> Comparison:
    rows = store.read_rows(results, [after.key, before.key], columns=["key", "system", *store.LISTS])
    by_key = {str(row["key"]): row for row in rows.to_dict("records")}
    pair = [{str(name): value for name, value in by_key[point.key].items()} for point in (after, before)]
    return compare_speed(pair[0], pair[1])


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={as_word(value)}" for name, value in values.items())


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "a search needs the package optuna, which is not installed: pip install 'foregate[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
