"""A system: one policy per axis, built together for one model, budget and seed."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from policies.contract import Floats, Future, Seen, Setting, needs_of
from traces.errors import InputError, nearest

AXES = ("predictor", "prefetch", "eviction", "allocation", "miss")
"""The independent choices that make a system, each a folder here and a group under `conf/`."""

Part = tuple[type, Mapping[str, Any]]
"""A policy class and the parameters of its YAML."""


@dataclass(frozen=True)
class Composition:
    """What a system is made of, before it knows model and budget."""

    name: str
    parts: Mapping[str, Part]
    """By axis."""
    drop_unused_prefetches: bool = False
    """Whether a prefetched expert that its event did not use leaves at once."""
    reupload_after_use: bool = False
    """Whether every use spoils the device copy, which is then transferred again (Fate's released code)."""

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that any part needs."""
        return frozenset().union(*(needs_of(cls) for cls, _ in self.parts.values()))

    def check(self, capabilities: frozenset[str], trace: str) -> None:
        """Raise InputError where a part needs what `trace`, which offers `capabilities`, does not hold."""
        for axis, (cls, _) in self.parts.items():
            missing = needs_of(cls) - capabilities - {"future"}
            if missing:
                raise InputError(
                    f"system '{self.name}': its {axis} {cls.__name__} needs {_named(missing)}, which trace '{trace}' does "
                    f"not hold; choose another {axis} or a trace recorded with it"
                )


@dataclass(frozen=True)
class System:
    """A composition built for one setting: fresh policies, ready for one run."""

    composition: Composition
    setting: Setting
    predictor: Any
    prefetch: Any
    eviction: Any
    miss: Any
    observe: Callable[[Seen], None]
    """The predictor's `observe`, or nothing where it does not learn."""
    take: Callable[[Floats, int], int]
    """The prefetch rule's `take`, or all where it has none."""


def build_system(
    composition: Composition,
    *,
    slots: int,
    layers: int,
    experts: int,
    top_k: int,
    seed: int = 0,
    layer_ns: int = 0,
    transfer_ns: int = 0,
    future: Callable[[], Future] | None = None,
) -> System:
    """Build every part of `composition` for a device with `slots` expert slots.

    `future` is called only where a part declares that it needs it. Raises InputError where a parameter is wrong or a
    pool cannot hold one token's top-k.
    """
    if slots < top_k:
        raise InputError(
            f"budget gives {slots} expert slots, but one event needs {top_k} (the model's top-k); raise the budget to at "
            f"least {_share(top_k, layers * experts)} of all experts"
        )
    allocation = _build(composition, "allocation")
    pool_of, capacity = allocation.divide(slots, layers, experts, top_k)
    if len(pool_of) != layers or min(pool_of) < 0 or max(pool_of) >= len(capacity):
        raise InputError(
            f"system '{composition.name}': allocation {type(allocation).__name__} gives pools {list(pool_of)[:8]}: it must "
            f"name one of its {len(capacity)} pools, counted from 0, for each of {layers} layers"
        )
    if capacity.sum() > slots:
        raise InputError(
            f"system '{composition.name}': allocation {type(allocation).__name__} hands out {capacity.sum()} slots, but the "
            f"budget holds {slots}"
        )
    if capacity.min() < top_k:
        raise InputError(
            f"system '{composition.name}': allocation {type(allocation).__name__} leaves a layer with {capacity.min()} of "
            f"{slots} slots, but one event needs {top_k} (the model's top-k); raise the budget to at least "
            f"{_share(top_k, experts)} of all experts or choose allocation=global"
        )
    setting = Setting(
        layers=layers,
        experts=experts,
        top_k=top_k,
        pool_of=np.asarray(pool_of, np.int64),
        capacity=np.asarray(capacity, np.int64),
        seed=seed,
        layer_ns=layer_ns,
        transfer_ns=transfer_ns,
    )
    with_future = replace(setting, future=future()) if future and "future" in composition.needs else setting
    built = {
        axis: _build(composition, axis, with_future if "future" in needs_of(cls) else setting)
        for axis, (cls, _) in composition.parts.items()
        if axis != "allocation"
    }
    depth = built["prefetch"].depth
    if depth < 0:
        raise InputError(f"system '{composition.name}': prefetch.depth is {depth}: it must be at least 0")
    return System(
        composition,
        setting,
        observe=getattr(built["predictor"], "observe", _learn_nothing),
        take=getattr(built["prefetch"], "take", _take_all),
        **built,
    )


def find_part(axis: str, spec: Mapping[str, Any], also_from: tuple[str, ...] = ()) -> Part:
    """Return class and parameters of a policy's YAML: ``_target_`` and its parameters.

    Only classes of this project's `policies` package, and of the packages named in `also_from`, are imported.
    Raises InputError for anything else, and for parameters that the class does not take or whose type is wrong.
    """
    target = str(spec.get("_target_", ""))
    module_name, _, class_name = target.rpartition(".")
    package = target.partition(".")[0]
    if package != "policies" and package not in also_from:
        raise InputError(
            f"{axis}._target_ is '{target}': it must name a class of the package 'policies'; to use one of your own, "
            f"name its package too: plugins=[{package or 'PACKAGE'}]"
        )
    if not module_name:
        raise InputError(f"{axis}._target_ is '{target}': it must be written MODULE.CLASS")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"{axis}._target_ is '{target}', which cannot be imported: {error}") from error
    if not isinstance(cls, type) or not hasattr(cls, "build"):
        raise InputError(f"{axis}._target_ is '{target}', which is no policy: it must be a class with a method `build`")
    parameters = {name: value for name, value in spec.items() if name != "_target_"}
    known = [name for name in inspect.signature(cls.build).parameters if name != "setting"]
    types = _annotations(cls.build)
    for name, value in parameters.items():
        if name not in known:
            choice = nearest(name, known) if known else "it takes no parameters"
            raise InputError(f"{axis}.{name} is not a parameter of {class_name}: {choice}")
        if not _is_of(value, types.get(name, Any)):
            raise InputError(f"{axis}.{name} is {value!r}: it must be {_type_in_words(types[name])}")
    return cls, parameters


def _build(composition: Composition, axis: str, *setting: Setting) -> Any:
    cls, parameters = composition.parts[axis]
    try:
        return cls.build(*setting, **parameters)  # type: ignore[attr-defined]
    except (ValueError, TypeError) as error:
        raise InputError(f"system '{composition.name}': {axis}.{error}") from error


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
"""What YAML can hold and policies take."""


def _annotations(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that only type checkers see
        return {}


def _is_of(value: Any, wanted: Any) -> bool:
    """Whether a YAML value is what a parameter's annotation says; annotations not made of `_WORDS` allow anything."""
    kinds = typing.get_args(wanted) or (wanted,)
    # bool is an int to Python, and a whole number does for a float.
    return not set(kinds) <= set(_WORDS) or type(value) in kinds or (type(value) is int and float in kinds)


def _type_in_words(wanted: Any) -> str:
    return " or ".join(_WORDS[kind] for kind in typing.get_args(wanted) or (wanted,))


def _share(part: int, whole: int) -> str:
    """Return the least fraction with four decimals that is not below ``part / whole``."""
    return f"{-(-part * 10**4 // whole) / 10**4:.4f}"


def _learn_nothing(seen: Seen) -> None:
    """Stand in for a predictor that does not learn."""


def _take_all(scores: Floats, count: int) -> int:
    """Stand in for a prefetch rule that takes whatever is ranked."""
    return count


def _named(capabilities: frozenset[str]) -> str:
    texts = {"weights": "gate weights", "lookahead": "lookahead observations", "logits": "router logits"}
    return " and ".join(texts.get(name, name) for name in sorted(capabilities))
