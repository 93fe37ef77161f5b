"""Configurations: composed by Hydra from the groups under `conf/`, checked, and turned into plain dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from policies.system import AXES
from traces.errors import InputError, nearest

Config = dict[str, Any]
"""A composed configuration: mappings, lists, strings, numbers, booleans and None."""

_TYPES = {
    "precision": ((str,), "a text"),
    "seed": ((int,), "a whole number of at least 0"),
    "engine": ((str,), "a text"),
    "drop_unused_prefetches": ((bool,), "true or false"),
    "reupload_after_use": ((bool,), "true or false"),
    "free_link": ((bool,), "true or false"),
    "link_gb_per_s": ((int, float, type(None)), "a number of GB/s above 0, or null for the profile's own link"),
    "study": ((str,), "a name"),
    "axes": ((dict,), "a mapping such as {system: [lru, fate], budget: [0.25, 0.5]}"),
    "baselines": ((list,), "a list of systems, such as [lru, clairvoyant]"),
    "space": ((dict,), "a mapping such as {prefetch: {depth: [1, 2, 3]}}"),
    "trials": ((int,), "a whole number of at least 1"),
    "at_once": ((int,), "a whole number of at least 1"),
    "plugins": ((list,), "a list of packages, such as [mine]"),
    "results": ((str,), "a folder"),
    "json": ((bool,), "true or false"),
    "evidence": ((bool,), "true or false"),
    "graphs": ((bool,), "true or false"),
    "check": ((bool,), "true or false"),
    "source": ((str,), "a file"),
    "checkpoint": ((str,), "a folder or the id of a model"),
    "prompts": ((str,), "a file"),
    "format": ((str,), "a text"),
    "out": ((str, type(None)), "a file"),
    "base": ((str,), "a profile"),
    "options": ((dict,), "a mapping such as {NAME: VALUE}"),
    "recipe": ((str,), "a text"),
    "parameters": ((dict,), "a mapping such as {NAME: VALUE}"),
    "timeline": ((str, type(None)), "a file NAME.json.gz"),
    "timeline_steps": ((int, type(None)), "a whole number of steps, or null for all"),
    "select": ((dict,), "a mapping such as {COLUMN: VALUE}"),
    "figure": ((str, type(None)), "the name of a figure, or all"),
}
"""What the settings of all verbs may be."""

_GROUPS = {
    "trace": ("path", "tokens", "requests"),
    "workload": ("order", "batch", "phases"),
    "system": ("name", "ceiling"),
    "hardware": (),
    "model": (),
    **dict.fromkeys(AXES, ()),
}
"""Groups that every run needs, with their keys; those of the others are checked where they are used."""

_RUN = (
    "precision",
    "seed",
    "engine",
    "drop_unused_prefetches",
    "reupload_after_use",
    "free_link",
    "link_gb_per_s",
    "plugins",
    "results",
)
_OF_MANY = ("systems", "jobs", "json", "study", "axes", "baselines", "space", "trials", "at_once")
_KNOWN = (*_RUN, *_GROUPS, "budget", "timeline", "timeline_steps", *_OF_MANY)
"""Settings of a run, a comparison, a study or a search."""


def compose_config(name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Compose `name` (a file of `conf/`) with Hydra `overrides` and return it as a plain dict.

    ``trace=PATH`` is short for ``trace=file trace.path=PATH``. `config_dir` is searched besides `conf/`. A system that is
    changed part by part is named after it: ``system=lru eviction=sieve`` is called ``lru+eviction=sieve``. Raises
    InputError for what Hydra refuses.
    """
    config = compose_unnamed(name, overrides, config_dir)
    name_system(config, expand(overrides))
    return config


def compose_unnamed(name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Compose as `compose_config` does, but leave every name as its file has it."""
    overrides = expand(overrides)
    if config_dir is not None and not Path(config_dir).is_dir():
        raise InputError(f"--config-dir is '{config_dir}': there is no such folder")
    search = [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).absolute()}')}]"]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        try:
            composed = compose(name, [*overrides, *search])
            config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(readable(error, name, overrides, config_dir)) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def expand(overrides: Sequence[str]) -> list[str]:
    """Write ``trace=PATH`` out as ``trace=file trace.path='PATH'``."""
    expanded = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "trace" and ("/" in value or value.endswith(".safetensors")):
            expanded += ["trace=file", f"trace.path={quoted(value)}"]
        else:
            expanded.append(override)
    return expanded


def quoted(value: str) -> str:
    """Return `value` such that Hydra reads exactly this text."""
    return "'" + value.replace("'", "\\'") + "'"


def check_config(config: Config) -> None:
    """Raise InputError where a run's or a comparison's setting is unknown, missing or of the wrong type."""
    for name in config:
        if name not in _KNOWN:
            raise InputError(f"'{name}' is not a setting: {nearest(name, _KNOWN)}")
    for group, known in _GROUPS.items():
        if not isinstance(config.get(group), dict):
            raise InputError(f"{group} is not chosen: it must be one of {', '.join(options(group))}")
        for name in config[group]:
            if known and name not in known:
                raise InputError(f"'{group}.{name}' is not a setting: {nearest(name, known)}")
    check_types(config)


def check_types(config: Config) -> None:
    """Raise InputError where a setting of any verb is of the wrong type."""
    for name, (kinds, words) in _TYPES.items():
        # Not isinstance, for which true is a whole number.
        if name in config and (type(config[name]) not in kinds or _out_of_range(name, config[name])):
            raise InputError(f"{name} is {config[name]!r}: it must be {words}")


def _out_of_range(name: str, value: Any) -> bool:
    if name in ("trials", "at_once"):
        return bool(value < 1)
    return (name == "seed" and value < 0) or (name == "link_gb_per_s" and value is not None and not 0 < value < float("inf"))


def name_system(config: Config, overrides: Sequence[str]) -> None:
    """Name the config's system and hardware, if it has them, after themselves and every part that the overrides change."""
    constants = sorted(each for each in (word.lstrip("+") for word in overrides) if _changes_hardware(each))
    if constants and isinstance(config.get("hardware"), dict):
        config["hardware"]["name"] = "+".join([str(config["hardware"].get("name")), *constants])
    if "system" not in config:
        return
    if not isinstance(config["system"], dict) or not isinstance(config["system"].get("name"), str):
        raise InputError("system.name is missing: a file of the group system must say `system: {name: NAME}`")
    changes = [override.lstrip("+") for override in overrides if changes_system(override)]
    config["system"]["name"] = "+".join([config["system"]["name"], *sorted(changes)])


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's options: the files of ``conf/GROUP``, and of the same folder in `config_dir`."""
    own = [] if config_dir is None else Path(config_dir, group).glob("*.yaml")
    names = [entry.name for entry in (*(resources.files("conf") / group).iterdir(), *own)]
    return sorted({name.removesuffix(".yaml") for name in names if name.endswith(".yaml")})


def groups() -> list[str]:
    """Return the names of all groups: the folders of `conf/`."""
    return sorted(e.name for e in resources.files("conf").iterdir() if e.is_dir() and not e.name.startswith("_"))


def one_of(field: str, value: Any, known: Sequence[str]) -> str:
    """Return `value` if it is known; raise InputError that names the nearest otherwise."""
    if value not in known:
        raise InputError(f"{field} is '{value}': {nearest(str(value), known)}")
    return str(value)


def _changes_hardware(override: str) -> bool:
    return override.startswith(("hardware.", "link_gb_per_s="))


def changes_system(override: str) -> bool:
    """Whether an override, or the name of a setting, is of a system's parts rather than of what it runs on."""
    name = override.lstrip("+~").partition("=")[0]
    return name.partition(".")[0] in AXES or name in ("drop_unused_prefetches", "reupload_after_use", "free_link")


def readable(error: Exception, config_name: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Say in one sentence what Hydra said in several lines."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = match.groups()
        return f"{group}={option}: {group} '{option}' is unknown: {nearest(option, options(group, config_dir))}"
    if match := re.search(r"Could not override '([^']+)'", text):
        path = match.group(1)
        known = [key for key in _keys_beside(path, config_name, overrides) if key != "_target_"]
        if not known:
            return f"'{path}' is not a setting: the {path.partition('.')[0]} chosen takes no parameters"
        return f"'{path}' is not a setting: {nearest(path.rpartition('.')[2], known)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give one: {error.full_key}=..."
    return " ".join(text.split())


def _keys_beside(path: str, config_name: str, overrides: Sequence[str]) -> list[str]:
    """Return the keys that could have been meant by the last part of `path`."""
    good = [override for override in overrides if override.lstrip("+~").partition("=")[0] in groups()]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            node: Any = compose(config_name, good)
        for part in path.split(".")[:-1]:
            node = node[part]
        return sorted(map(str, node))
    except (HydraException, OmegaConfBaseException, TypeError):
        return groups()


def plain(config: Mapping[str, Any], *, without: Sequence[str]) -> Config:
    """Return a copy of `config` without some of its top-level keys."""
    return {key: value for key, value in config.items() if key not in without}
