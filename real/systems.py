"""Systems of the project's own configuration, read without Hydra: for machines that run models and not the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]

from policies.system import AXES, Composition, System, build_system, find_part
from sim.workload import Workload
from traces.errors import InputError, nearest

FLAGS = ("drop_unused_prefetches", "reupload_after_use")


def read_system(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a system as a cell holds it: ``name``, `FLAGS`, and by axis a policy's YAML.

    `overrides` swap an axis (``eviction=lru``) or set a value (``prefetch.depth=2``). Raises InputError for what is not
    there.
    """
    base, own = _file("", "simulate"), _file("system", name)
    if own.get("free_link"):
        raise InputError(f"system '{name}' needs a link that takes no time, which no machine has")
    chosen = {**_axes(base["defaults"]), **_axes(own.get("defaults", ()))}
    swapped = dict(override.split("=", 1) for override in overrides if override.partition("=")[0] in AXES)
    parts: dict[str, Any] = {axis: _file(axis, (chosen | swapped)[axis]) for axis in AXES}
    for axis in AXES:
        if axis not in swapped:
            parts[axis] |= own.get(axis, {})
    flags = {flag: own.get(flag, base[flag]) for flag in FLAGS}
    for override in overrides:
        key, _, value = override.partition("=")
        axis, _, parameter = key.partition(".")
        if key in FLAGS:
            flags[key] = yaml.safe_load(value)
        elif axis in AXES and parameter:
            parts[axis][parameter] = yaml.safe_load(value)
        elif key not in AXES:
            raise InputError(f"'{override}' is no part of a system: {nearest(axis, (*AXES, *FLAGS))}")
    return {"name": "+".join([name, *sorted(overrides)]), **flags, **parts}


def composition(system: Mapping[str, Any]) -> Composition:
    """Return the policies of such a system. Raises InputError."""
    return Composition(
        name=system["name"],
        parts={axis: find_part(axis, system[axis]) for axis in AXES},
        drop_unused_prefetches=system["drop_unused_prefetches"],
        reupload_after_use=system["reupload_after_use"],
    )


def cell_system(cell: Mapping[str, Any], workload: Workload) -> System:
    """Build the system of a cell (fields of `real.replay.Cell`) afresh, with the future of `workload`. Raises InputError."""
    parts = composition(cell["system"])
    parts.check(workload.trace.capabilities(), cell["trace"])
    model = workload.trace.model
    return build_system(
        parts,
        slots=cell["slots"],
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        seed=cell["seed"],
        layer_ns=cell["layer_ns"],
        transfer_ns=cell["transfer_ns"],
        future=lambda: workload.future,
    )


def _file(group: str, name: str) -> dict[str, Any]:
    folder = resources.files("conf")
    folder = folder / group if group else folder
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = [entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
        raise InputError(f"{group} is '{name}': {nearest(name, known)}")
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


def _axes(defaults: Sequence[Any]) -> dict[str, str]:
    """Return the options that a defaults list chooses, by axis."""
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    pairs = [(key.removeprefix("override ").lstrip("/"), option) for entry in entries for key, option in entry.items()]
    return {axis: option for axis, option in pairs if axis in AXES}
