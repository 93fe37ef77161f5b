"""Measured runs without a GPU: what the simulator itself would have measured on a machine whose costs are known."""

import numpy as np
from builders import make_trace
from test_hardware import tiny_profile

from real.systems import cell_system
from real.validation.comparison import cell_costs, first_steps
from real.validation.measured import MeasuredRun, make_steps
from real.validation.pricing import price
from sim.engines import run_engine
from sim.hardware import make_hardware
from sim.result import KINDS
from sim.workload import make_workload
from traces import content_hash

LAYERS, EXPERTS, TOP_K = 3, 8, 2
SHAPE = {
    "layers": LAYERS,
    "experts": EXPERTS,
    "top_k": TOP_K,
    "hidden": 4,
    "expert_width": 8,
    "shared_width": 0,
    "heads": 1,
    "vocabulary": 16,
}
PARTS = {
    "predictor": {"_target_": "policies.predictor.none.NoPrediction"},
    "prefetch": {"_target_": "policies.prefetch.none.NoPrefetch"},
    "eviction": {"_target_": "policies.eviction.lru.LRU"},
    "allocation": {"_target_": "policies.allocation.whole_device.WholeDevice"},
    "miss": {"_target_": "policies.miss.wait.Wait"},
}
FIFO = {"eviction": {"_target_": "policies.eviction.fifo.FIFO"}}
PREFETCHING = {
    "predictor": {"_target_": "policies.predictor.previous_token.PreviousToken"},
    "prefetch": {"_target_": "policies.prefetch.top_n.TopN", "n": 2, "depth": 1},
}


def routing(seed=0, tokens=30):
    rng = np.random.default_rng(seed)
    ids = [[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(tokens)]
    trace = make_trace(ids, expert_count=EXPERTS)
    from dataclasses import replace

    return replace(trace, hash=content_hash(trace))


TRACE = routing()


def machine(**changes):
    """Return the tiny machine with other constants: group__name=value."""
    profile = tiny_profile()
    for name, value in changes.items():
        group, _, constant = name.partition("__")
        profile[group][constant]["value"] = value
    return make_hardware(profile)


def cell_of(name="cell", system="lru", slots=10, preload=False, marked=8, parts=None):
    """Return the fields of a `real.replay.Cell`: 4 steps of warm-up, then timed and `marked` ones, 30 in all."""
    return {
        "name": name,
        "trace": "routing.safetensors",
        "workload": {"order": "one_request", "batch": 1, "phases": "all"},
        "model": SHAPE,
        "system": {"name": system, "drop_unused_prefetches": False, "reupload_after_use": False, **PARTS, **(parts or {})},
        "slots": slots,
        "warmup": 4,
        "steps": 26 - marked,
        "marked": marked,
        "seed": 0,
        "layer_ns": 1000,
        "transfer_ns": 500,
        "chunk_bytes": 400,
        "window_bytes": 800,
        "preload": preload,
        "one_by_one": True,
        "prove": False,
    }


def needed(workload):
    """Return the keys that every event needs."""
    events = workload.events
    return [events.keys[slice(*events.offsets[event : event + 2])].tolist() for event in range(events.total)]


def measured_on(hardware, cell, trace=TRACE):
    """Return what `cell` would have measured on `hardware`, if the memory model were the machine."""
    workload = first_steps(make_workload(trace, **cell["workload"]), 30)
    costs = cell_costs(cell, hardware, workload)
    log = []
    if cell["preload"]:
        log = [(0, "hit", key, event) for event, keys in enumerate(needed(workload)) for key in keys]
        bytes_by_kind = dict.fromkeys(KINDS, 0)
        parts_of_steps = price(log, workload, costs, cell_system(cell, workload)).steps
    else:
        run, _ = run_engine("reference", lambda: cell_system(cell, workload), workload, costs, log)
        bytes_by_kind, parts_of_steps = run.bytes_by_kind, run.steps
    link = price(log, workload, costs, cell_system(cell, workload)).link_busy_ns
    first, split = cell["warmup"], cell["warmup"] + cell["steps"]
    parts = {name: getattr(parts_of_steps, name)[split:].tolist() for name in ("compute", "wait", "host")}
    counts = {name: getattr(parts_of_steps, name)[first:].tolist() for name in ("hits", "late_hits", "misses")}
    parts["link_busy"] = link[split:].tolist()
    total = parts_of_steps.duration[first:split].tolist()
    steps = make_steps(first, workload.decode[first:], total, parts, counts)
    return MeasuredRun(
        cell, trace.hash, "a machine of the test's", None, {"torch": "none"}, steps, log, bytes_by_kind, 1e9, 0.97
    )
