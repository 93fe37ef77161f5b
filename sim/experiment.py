"""One run from a configuration: trace, workload, hardware, model, system and budget in; one row of figures out."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from policies.system import AXES, Composition, System, find_part
from sim import store
from sim.budget import slots_within
from sim.config import Config, check_config, one_of, plain
from sim.costs import Costs, make_costs, with_free_link
from sim.engines import ENGINES, build_for, run_engine
from sim.hardware import make_hardware, model_spec, with_bandwidth
from sim.result import Run, limited_by, metrics
from sim.workload import Workload, make_workload
from traces import Trace, bundled, content_hash, load_trace, slice_requests, split_requests, take_tokens
from traces.errors import InputError
from traces.trace import ModelSpec

REQUESTS = ("tuning", "held_out")
"""Parts of a trace that share no request: parameters are tuned on one and reported on the other."""

_WHERE_TO = ("results", "jobs", "systems", "json", "timeline", "timeline_steps")
"""Settings that say where or how to run, not what: a row is the same whoever wrote it, and wherever."""


def simulate(config: Config, *, resume: bool = True) -> dict[str, Any]:
    """Run one system once and return its row; the row is stored under ``config["results"]``.

    A run whose row is stored already is read back instead, unless `resume` is False. Raises InputError.
    """
    check_config(config)
    workload = workload_of(config)
    key = key_of(config, workload.trace)
    if resume and store.has(config["results"], key):
        stored = store.read_rows(config["results"], [key]).iloc[0]
        return {str(column): value for column, value in stored.items()}
    costs, spec = costs_of(config, workload)
    run, engine = run_system(config, workload, costs)
    slots = slots_of(config["budget"], workload.trace.model, costs)
    row = {**_identity(config, workload, spec, costs, slots, run), "engine": engine, **metrics(run, workload), "key": key}
    row["limited_by"] = limited_by(row)
    store.write_row(config["results"], row)
    return row


def run_system(
    config: Config, workload: Workload, costs: Costs, log: list[tuple[Any, ...]] | None = None
) -> tuple[Run, str]:
    """Build the config's system, run it and return what happened, and in which engine."""
    engine = one_of("engine", config["engine"], ENGINES)
    return run_engine(engine, lambda: system_of(config, workload, costs), workload, costs, log)


def system_of(config: Config, workload: Workload, costs: Costs) -> System:
    """Build the config's system afresh, ready for one run."""
    trace = workload.trace
    composition = composition_of(config)
    composition.check(trace.capabilities(), trace_name(config))
    return build_for(composition, workload, costs, slots_of(config["budget"], trace.model, costs), config["seed"])


def composition_of(config: Config) -> Composition:
    """Return the policies that the config names."""
    plugins = tuple(config["plugins"])
    if plugins and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return Composition(
        name=config["system"]["name"],
        parts={axis: find_part(axis, config[axis], plugins) for axis in AXES},
        drop_unused_prefetches=bool(config["drop_unused_prefetches"]),
        reupload_after_use=bool(config["reupload_after_use"]),
    )


def workload_of(config: Config) -> Workload:
    """Return the steps to run; read once per process and trace."""
    path = trace_path(config)
    file = path.stat() if path.is_file() else None
    version = file and (file.st_ino, file.st_mtime_ns, file.st_size)
    arrangement = json.dumps(config["workload"], sort_keys=True)
    return _workload(str(path), version, trace_tokens(config), trace_requests(config), arrangement)


@lru_cache(maxsize=8)
def _workload(
    path: str, version: tuple[int, ...] | None, tokens: int | None, requests: str | None, arrangement: str
) -> Workload:
    trace = load_trace(path)
    part = trace if tokens is None else take_tokens(trace, tokens)
    if requests is not None:
        part = slice_requests(part, split_requests(part)[REQUESTS.index(requests)])
    if part is not trace:
        part = replace(part, hash=content_hash(part))
    return make_workload(part, **json.loads(arrangement))


def trace_path(config: Config) -> Path:
    """Return the trace file; ``bundled:NAME`` stands for a recording that comes with the package."""
    path = str(config["trace"]["path"])
    if not path.startswith("bundled:"):
        return Path(path)
    known = bundled()
    return known[one_of("trace.path: the bundled recording", path.removeprefix("bundled:"), list(known))]


def trace_tokens(config: Config) -> int | None:
    """Return how many of the trace's tokens to take; None is all."""
    tokens: int | None = config["trace"].get("tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise InputError(f"trace.tokens is {tokens!r}: it must be a whole number of tokens, at least 1, or null")
    return tokens


def trace_requests(config: Config) -> str | None:
    """Return which of the trace's requests to take, one of `REQUESTS`; None is all."""
    requests = config["trace"].get("requests")
    return None if requests is None else one_of("trace.requests", requests, REQUESTS)


def trace_name(config: Config) -> str:
    """Return the name by which tables call the trace: its file's, and which of its requests are taken."""
    requests = trace_requests(config)
    return trace_path(config).stem + ("" if requests is None else f"+requests={requests}")


def costs_of(config: Config, workload: Workload) -> tuple[Costs, ModelSpec]:
    """Return what everything costs, and the model whose bytes are priced; computed once per process and setting."""
    names = ("hardware", "model", "precision", "free_link", "link_gb_per_s")
    return _costs(json.dumps({name: config[name] for name in names}, sort_keys=True), workload)


@lru_cache(maxsize=64)
def _costs(setting: str, workload: Workload) -> tuple[Costs, ModelSpec]:
    config = json.loads(setting)
    hardware = make_hardware(config["hardware"])
    if config["link_gb_per_s"] is not None:
        hardware = with_bandwidth(hardware, round(config["link_gb_per_s"] * 1e9))
    spec = model_spec(config["model"], workload.trace.model)
    costs = make_costs(hardware, spec, np.diff(workload.offsets), workload.context, config["precision"])
    return (with_free_link(costs) if config["free_link"] else costs), spec


def slots_of(budget: Any, model: ModelSpec, costs: Costs) -> int:
    """Return how many experts a budget holds: a fraction of all of them, or bytes (a number above 1, or ``4GB``)."""
    return slots_within(budget, model.layers * model.experts, costs.expert_bytes)


def key_of(config: Config, trace: Trace) -> str:
    """Return the name of a result: a hash of everything that decides it, configuration, trace and code."""
    what = plain(config, without=(*_WHERE_TO, "plugins"))
    what["trace"] = {"hash": trace.hash, "tokens": trace.tokens, "name": trace_name(config)}
    return hashlib.sha256(json.dumps([what, _code_digest(config)], sort_keys=True).encode()).hexdigest()


def _code_digest(config: Config) -> str:
    """Return a hash over the sources that decide a result: policies, memory model, and policies of the user's own."""
    digest = hashlib.sha256(_project_digest().encode())
    for cls, _ in composition_of(config).parts.values():
        source = sys.modules[cls.__module__].__file__
        if source is not None and not cls.__module__.startswith("policies."):
            digest.update(Path(source).read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _project_digest() -> str:
    root = Path(__file__).parent.parent
    files = [*sorted((root / "policies").rglob("*.py")), *sorted((root / "sim").rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _identity(config: Config, workload: Workload, spec: ModelSpec, costs: Costs, slots: int, run: Run) -> dict[str, Any]:
    """Return the columns that say what was run."""
    trace = workload.trace
    all_slots = trace.model.layers * trace.model.experts
    kv_bytes = int(workload.context.max()) * (spec.kv_bytes_per_token or 0)
    peak_bytes = run.peak_slots * costs.expert_bytes + (spec.other_bytes or 0) + kv_bytes
    return {
        "trace": trace_name(config),
        "trace_hash": trace.hash,
        "trace_kind": trace.provenance.kind,
        "trace_model": trace.model.name,
        "workload": workload.name,
        "hardware": config["hardware"]["name"],
        "model": spec.name if config["precision"] == "bf16" else f"{spec.name} at {config['precision']}",
        "system": config["system"]["name"],
        "ceiling": bool(config["system"]["ceiling"]) or "future" in composition_of(config).needs,
        "budget": slots / all_slots,
        "budget_bytes": slots * costs.expert_bytes,
        "slots": slots,
        "seed": config["seed"],
        "code_version": f"{metadata.version('foregate')}+{_project_digest()[:12]}",
        "config": json.dumps(plain(config, without=_WHERE_TO), sort_keys=True),
        "device_bytes_peak": peak_bytes,
        "note": _caveats(config, trace.model, spec, peak_bytes),
    }


def _caveats(config: Config, recorded: ModelSpec, priced: ModelSpec, peak_bytes: int) -> str:
    """Say what a reader of the row must know: shapes that differ, memory that the device does not have."""
    caveats = []
    shapes = [f"{model.layers} x {model.experts} top-{model.top_k}" for model in (recorded, priced)]
    if shapes[0] != shapes[1]:
        caveats.append(f"the routing is of a {shapes[0]} model, the bytes are of a {shapes[1]} one")
    memory_bytes = make_hardware(config["hardware"]).memory_bytes
    if peak_bytes > memory_bytes:
        caveats.append(f"needs {peak_bytes / 1e9:.1f} GB, but the device has {memory_bytes / 1e9:.1f} GB")
    return "; ".join(caveats)
