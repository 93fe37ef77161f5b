"""Hardware profiles and model sizes, read strictly from plain mappings (YAML that is already resolved)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from traces.errors import InputError, nearest
from traces.trace import ModelSpec

TAGS = ("measured", "datasheet", "assumed")
"""Where a constant may come from: a measurement, the vendor's figure, or neither."""

CURVE_UNIT, CONTEXT_UNIT = "[bytes, ns]", "[tokens, ns]"
_POSITIVE, _FROM_ZERO = 1, 0

# group -> constant -> (unit, smallest value that makes sense)
_LAYOUT: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "link": {
        "h2d": (CURVE_UNIT, _POSITIVE),
        "h2d_train": (CURVE_UNIT, _POSITIVE),
        "chunk_bytes": ("bytes", _POSITIVE),
        "committed_chunks": ("chunks", _FROM_ZERO),
    },
    "compute": {
        "memory_bandwidth": ("bytes/s", _POSITIVE),
        "flops": ("flop/s", _POSITIVE),
        "expert_launch_ns": ("ns", _FROM_ZERO),
        "layer_launch_ns": ("ns", _FROM_ZERO),
        "step_launch_ns": ("ns", _FROM_ZERO),
        "beside_ns": ("ns", _FROM_ZERO),
    },
    "host": {
        "readout_ns": ("ns", _FROM_ZERO),
        "gate_issue_ns": ("ns", _FROM_ZERO),
        "expert_issue_ns": ("ns", _FROM_ZERO),
        "step_ns": ("ns", _FROM_ZERO),
        "step_readout_ns": ("ns", _FROM_ZERO),
        "demand_issue_ns": ("ns", _FROM_ZERO),
        "ahead_ns": ("ns", _FROM_ZERO),
    },
    "device": {"memory_bytes": ("bytes", _POSITIVE)},
}

_MODEL_LAYOUT: Mapping[str, tuple[str, int]] = {
    "attention": (CONTEXT_UNIT, _POSITIVE),
    "shared_ns": ("ns", _FROM_ZERO),
    "group_ns": ("ns", _FROM_ZERO),
    "expert_ns": ("ns", _POSITIVE),
    "step_ns": ("ns", _POSITIVE),
}

OPTIONAL = (
    "link.h2d_train",
    "link.committed_chunks",
    "compute.beside_ns",
    "host.step_readout_ns",
    "host.demand_issue_ns",
    "host.ahead_ns",
)
"""Constants that a profile may lack; the memory model then lacks the term."""

Curve = tuple[tuple[int, int], ...]
"""Points (bytes or tokens, ns), both rising."""

Value = int | Curve
"""A whole number, or the points of a curve."""


class Constant(NamedTuple):
    """One figure of a profile and where it comes from, as reports print it."""

    name: str
    """``group.constant``, as in the YAML."""
    value: Value
    unit: str
    tag: str
    """One of `TAGS`."""
    source: str
    spread: tuple[tuple[int, int], ...] = ()
    """10th and 90th percentile of what was measured: one pair for a number, one per point for a curve; or nothing."""


class ModelTimes(NamedTuple):
    """What one model takes on the device at batch 1 in bf16, measured on the kernels that run it."""

    attention: Curve
    """Attention and gate of one layer, by cached tokens."""
    shared_ns: int
    """Its shared experts, which run after the gate."""
    group_ns: int
    """Once per group of routed experts that are computed together."""
    expert_ns: int
    """Every routed expert besides."""
    step_ns: int
    """Embedding, last norm, head and sampling."""


@dataclass(frozen=True)
class Hardware:
    """One machine with one GPU: its link, its compute stream, its host thread and its memory.

    Built by `make_hardware`; `docs/hardware.md` says what each constant means and how `sim.costs` uses it.
    """

    name: str
    h2d: Curve
    """One host-to-device copy on a link that was idle."""
    chunk_bytes: int
    """An expert crosses the link in copies of at most this many bytes."""
    memory_bandwidth: int
    """Bytes/s at which kernels read weights."""
    flops: int
    """Floating-point operations/s of large bf16 matrix products."""
    expert_launch_ns: int
    """Device time of one expert beyond its bytes or flops."""
    layer_launch_ns: int
    """Device time of one layer's attention and gate beyond their bytes or flops."""
    step_launch_ns: int
    """Device time of a step outside its layers: embedding, head, sampling."""
    readout_ns: int
    """From the end of the gate on the device until the host knows the routed experts."""
    gate_issue_ns: int
    """Host time to issue attention and gate of one layer."""
    expert_issue_ns: int
    """Host time to decide and issue the experts of one layer."""
    host_step_ns: int
    """Host time once per step."""
    memory_bytes: int
    """Device memory."""
    h2d_train: Curve | None = None
    """One host-to-device copy behind another one; None where it was not measured apart."""
    step_readout_ns: int | None = None
    """From the end of a step on the device until the host goes on; None where the host does not wait for that end."""
    committed_chunks: int = 0
    """Chunks that are given to the copy engine ahead of the one that is moving, and cannot be called back."""
    demand_issue_ns: int = 0
    """Host time from knowing the routed experts until the link is given what is missing."""
    ahead_ns: int = 0
    """Host time for predicting one layer ahead."""
    beside_ns: int = 0
    """By how much longer attention, or a group of experts, takes while the link is busy."""
    models: Mapping[str, ModelTimes] = field(default_factory=dict)
    """Times of models that were measured themselves; for others they follow from bytes and flops."""
    constants: tuple[Constant, ...] = ()
    """Every figure above with its source."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """What a calibration noted besides: device, driver, versions, and measurements that the memory model does not use."""

    def provenance(self) -> list[Constant]:
        """Return (name, value, unit, tag, source) of every constant, in the order of the YAML."""
        return list(self.constants)

    def tags(self) -> str:
        """Return how many constants have which tag, e.g. ``9 measured, 3 assumed``."""
        count = Counter(constant.tag for constant in self.constants)
        return ", ".join(f"{count[tag]} {tag}" for tag in TAGS if count[tag])


def make_hardware(profile: Mapping[str, Any]) -> Hardware:
    """Check a profile and return it as `Hardware`.

    A profile has a `name` and the groups ``link``, ``compute``, ``host`` and ``device``; every constant is a mapping of
    `value`, `unit`, `tag`, `source` and, if it likes, `spread`. A mapping `models` may hold times of single models, by name.
    A mapping `machine` is kept as it is. Raises InputError that names the field, its value and what is right.
    """
    _same_keys("hardware", profile, ("name", *_LAYOUT), ("name", *_LAYOUT, "models", "machine"))
    name = _text("hardware.name", profile["name"])
    constants: dict[str, Constant] = {}
    for group, layout in _LAYOUT.items():
        required = [key for key in layout if f"{group}.{key}" not in OPTIONAL]
        _same_keys(f"hardware.{group}", profile[group], required, layout)
        for key, (unit, smallest) in layout.items():
            if key not in profile[group]:
                continue
            constants[f"{group}.{key}"] = _constant(f"{group}.{key}", profile[group][key], unit, smallest)

    measured_models = _mapping("hardware.models", profile.get("models") or {})
    for model, times in measured_models.items():
        _same_keys(f"hardware.models.{model}", times, _MODEL_LAYOUT)
        for key, (unit, smallest) in _MODEL_LAYOUT.items():
            constants[f"models.{model}.{key}"] = _constant(f"models.{model}.{key}", times[key], unit, smallest)

    def number(of: str) -> int:
        value = constants[of].value
        assert isinstance(value, int)
        return value

    def curve(of: str) -> Curve:
        value = constants[of].value
        assert isinstance(value, tuple)
        return value

    return Hardware(
        name=name,
        h2d=curve("link.h2d"),
        chunk_bytes=number("link.chunk_bytes"),
        memory_bandwidth=number("compute.memory_bandwidth"),
        flops=number("compute.flops"),
        expert_launch_ns=number("compute.expert_launch_ns"),
        layer_launch_ns=number("compute.layer_launch_ns"),
        step_launch_ns=number("compute.step_launch_ns"),
        readout_ns=number("host.readout_ns"),
        gate_issue_ns=number("host.gate_issue_ns"),
        expert_issue_ns=number("host.expert_issue_ns"),
        host_step_ns=number("host.step_ns"),
        memory_bytes=number("device.memory_bytes"),
        h2d_train=curve("link.h2d_train") if "link.h2d_train" in constants else None,
        step_readout_ns=number("host.step_readout_ns") if "host.step_readout_ns" in constants else None,
        committed_chunks=number("link.committed_chunks") if "link.committed_chunks" in constants else 0,
        demand_issue_ns=number("host.demand_issue_ns") if "host.demand_issue_ns" in constants else 0,
        ahead_ns=number("host.ahead_ns") if "host.ahead_ns" in constants else 0,
        beside_ns=number("compute.beside_ns") if "compute.beside_ns" in constants else 0,
        models={
            model: ModelTimes(
                curve(f"models.{model}.attention"),
                *(number(f"models.{model}.{key}") for key in ("shared_ns", "group_ns", "expert_ns", "step_ns")),
            )
            for model in measured_models
        },
        constants=tuple(constants.values()),
        machine=dict(_mapping("hardware.machine", profile.get("machine") or {})),
    )


def with_bandwidth(hardware: Hardware, bytes_per_s: int) -> Hardware:
    """Return the same machine with a link of another bandwidth, whose smallest copy takes as long as before."""
    size, latency_ns = hardware.h2d[0]
    more = 2**30
    line = ((size, latency_ns), (size + more, latency_ns - (-more * 10**9 // bytes_per_s)))
    return replace(hardware, h2d=line, h2d_train=None)


def model_spec(sizes: Mapping[str, Any], recorded: ModelSpec | None = None) -> ModelSpec:
    """Check the sizes of a model and return them as `ModelSpec`.

    ``{"name": "trace"}`` stands for the model that the trace was recorded on, which is `recorded`. Raises
    InputError that names the field, its value and what is right.
    """
    if dict(sizes) == {"name": "trace"}:
        if recorded is None:
            raise InputError("model.name is 'trace', but there is no trace to ask: choose a model with model=NAME")
        return recorded
    required = ("name", "layers", "experts", "top_k")
    _same_keys("model", sizes, required, [each.name for each in fields(ModelSpec)])
    found: dict[str, Any] = {"name": _text("model.name", sizes["name"])}
    for key in ("layers", "experts", "top_k"):
        found[key] = _whole(f"model.{key}", sizes[key], _POSITIVE)
    found["shared_experts"] = _whole("model.shared_experts", sizes.get("shared_experts", 0), _FROM_ZERO)
    for key in ("hidden_size", "expert_width", "other_bytes", "kv_bytes_per_token"):
        value = sizes.get(key)
        found[key] = None if value is None else _whole(f"model.{key}", value, _POSITIVE)
    by_precision = _mapping("model.expert_bytes", sizes.get("expert_bytes") or {})
    found["expert_bytes"] = {
        _text("a precision in model.expert_bytes", precision): _whole(
            f"model.expert_bytes.{precision}", value, _POSITIVE, "bytes"
        )
        for precision, value in by_precision.items()
    }
    if found["top_k"] > found["experts"]:
        raise InputError(f"model.top_k is {found['top_k']}: it must be at most the {found['experts']} experts of a layer")
    return ModelSpec(**found)


def _constant(name: str, entry: Any, unit: str, smallest: int) -> Constant:
    where = f"hardware.{name}"
    required = ("value", "unit", "tag", "source")
    _same_keys(where, entry, required, (*required, "spread"))
    if entry["unit"] != unit:
        raise InputError(f"{where}.unit is '{entry['unit']}': it must be '{unit}'")
    if entry["tag"] not in TAGS:
        raise InputError(f"{where}.tag is '{entry['tag']}': {nearest(str(entry['tag']), TAGS)}")
    value: Value = (
        _curve(f"{where}.value", entry["value"], unit)
        if unit in (CURVE_UNIT, CONTEXT_UNIT)
        else _whole(f"{where}.value", entry["value"], smallest, unit)
    )
    source = _text(f"{where}.source", entry["source"])
    return Constant(name, value, unit, entry["tag"], source, _spread(f"{where}.spread", entry.get("spread"), value))


def _spread(where: str, spread: Any, value: Value) -> tuple[tuple[int, int], ...]:
    """Return pairs (10th, 90th percentile): one for a number, one for every point of a curve."""
    if spread is None:
        return ()
    pairs = spread if isinstance(value, tuple) else [spread]
    count = len(value) if isinstance(value, tuple) else 1
    if not isinstance(pairs, (list, tuple)) or len(pairs) != count:
        raise InputError(f"{where} is {spread!r}: it must be one pair [10th percentile, 90th] per point of the curve")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError(f"{where} holds {pair!r}: it must be a pair [10th percentile, 90th]")
    found = tuple((_whole(where, low, _FROM_ZERO), _whole(where, high, _FROM_ZERO)) for low, high in pairs)
    for low, high in found:
        if low > high:
            raise InputError(f"{where} holds [{low}, {high}]: the 10th percentile is above the 90th")
    return found


def _curve(where: str, points: Any, unit: str) -> Curve:
    """Return the points of a curve; bytes or tokens must rise, time must not fall."""
    what = unit.strip("[]").partition(",")[0]
    if not isinstance(points, (list, tuple)) or len(points) < 2:
        raise InputError(f"{where} is {points!r}: it must be a list of at least two points {unit}")
    curve: list[tuple[int, int]] = []
    for index, point in enumerate(points):
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise InputError(f"{where}[{index}] is {point!r}: it must be one point {unit}")
        size = _whole(f"{where}[{index}][0]", point[0], _POSITIVE, what)
        time = _whole(f"{where}[{index}][1]", point[1], _FROM_ZERO, "ns")
        if curve and size <= curve[-1][0]:
            raise InputError(f"{where}[{index}][0] is {size}: {what} must rise, and the point before has {curve[-1][0]}")
        if curve and time < curve[-1][1]:
            raise InputError(f"{where}[{index}][1] is {time}: time must not fall, and the point before has {curve[-1][1]}")
        curve.append((size, time))
    return tuple(curve)


def _same_keys(where: str, found: Any, required: Any, known: Any = None) -> None:
    """Raise InputError unless `found` is a mapping with all `required` keys and none but the `known` ones."""
    keys = _mapping(where, found)
    known = list(required if known is None else known)
    for key in keys:
        if key not in known:
            raise InputError(f"{where} has no field '{key}': {nearest(str(key), known)}")
    for key in required:
        if key not in keys:
            raise InputError(f"{where}.{key} is missing: {where} needs {', '.join(required)}")


def _mapping(where: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is {found!r}: it must be a mapping")
    return found


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is {value!r}: it must be a text that is not empty")
    return value


def _whole(where: str, value: Any, smallest: int, unit: str = "") -> int:
    """Return a whole number of at least `smallest`; YAML's ``2.9e+12`` counts as whole."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value != value or value < smallest or value == float("inf") or int(value) != value:
        of_unit = f" of {unit}" if unit else ""
        raise InputError(f"{where} is {value!r}: it must be a whole number{of_unit}, at least {smallest}")
    return int(value)
