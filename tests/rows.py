"""Made-up result rows, for tests of what stores, compares and shows them."""

import hashlib
import json

import numpy as np
import pandas as pd

from sim.result import KINDS, limited_by

EXPERTS_BYTES = 57_000_000_000

#         ms per token: compute, host, wait at a budget of one quarter; share of prefetched bytes
SYSTEMS = {
    "lru": (9.0, 2.0, 60.0, 0.0),
    "lfu": (9.0, 2.0, 52.0, 0.0),
    "moe-infinity": (9.0, 3.5, 41.0, 0.5),
    "fate": (9.0, 4.0, 33.0, 0.8),
    "clairvoyant": (9.0, 2.0, 21.0, 0.0),
    "perfect_prefetch": (9.0, 2.5, 11.0, 1.0),
    "all_resident": (9.0, 2.0, 0.0, 0.0),
}
CEILINGS = ("clairvoyant", "perfect_prefetch", "all_resident")


def make_row(
    system="lru",
    compute=9.0,
    host=2.0,
    wait=60.0,
    prefetched=0.0,
    budget=0.25,
    seed=0,
    requests=12,
    noise=0.0,
    prefill=False,
    **other,
):
    """Return a row of `system`; times in ms per token, `noise` the relative spread of a request's speed.

    All rows share the requests and their lengths. Keyword arguments that name a column replace its value.
    """
    lengths = np.random.default_rng(1).integers(40, 200, requests)
    spread = np.random.default_rng([seed, *system.encode()]).normal(1, noise, requests)
    per_token = compute + host + wait
    time = lengths * per_token * 1e6 * spread
    tokens = int(lengths.sum())
    tpot = float(time.sum() / tokens / 1e6)
    compute, host = compute * tpot / per_token, host * tpot / per_token
    accesses = tokens * 384
    misses = int(accesses * min(1.0, wait / 100))
    late = int(misses * prefetched * 0.3)
    parts = {
        "demand": 1 - prefetched,
        "useful": 0.6 * prefetched,
        "late": 0.3 * prefetched,
        "wasted": 0.2 * prefetched,
    }
    moved = {f"{kind}_bytes": int(misses * 9_437_184 * parts.get(kind, 0)) for kind in KINDS}
    ttft = 900.0 if prefill else float("nan")
    row = {
        "trace": "qwen3-30b-a3b_mixed",
        "trace_hash": "f" * 64,
        "trace_kind": "recorded",
        "trace_model": "qwen3-30b-a3b",
        "workload": "one_request",
        "hardware": "h100_pcie",
        "model": "qwen3-30b-a3b",
        "system": system,
        "ceiling": system in CEILINGS,
        "budget": budget,
        "budget_bytes": int(budget * EXPERTS_BYTES),
        "slots": int(budget * 6144),
        "seed": seed,
        "engine": "fast",
        "code_version": "0.1.0",
        "config": json.dumps({"hardware": {"link": {"gbps": 55.0, "tag": "measured"}, "host": {"tag": "assumed"}}}),
        "device_bytes_peak": int(budget * EXPERTS_BYTES) + 3_000_000_000,
        "note": "",
        "tokens_per_s": 1e3 / tpot,
        **{f"tpot_ms_{part}": tpot * by for part, by in _SPREAD.items()},
        **{f"ttft_ms_{part}": ttft * by for part, by in _SPREAD.items()},
        "compute_ms_per_token": compute,
        "wait_ms_per_token": max(0.0, tpot - compute - host),
        "host_ms_per_token": host,
        "link_busy_share": min(1.0, wait / 70),
        "hits": accesses - misses - late,
        "late_hits": late,
        "misses": misses,
        "hit_rate": (accesses - misses - late) / accesses,
        **moved,
        "moved_mb_per_token": sum(moved.values()) / tokens / 1e6,
        "prefetches": int(misses * prefetched),
        "cancelled_prefetches": 0,
        "predictor_precision": 0.8 if prefetched else float("nan"),
        "predictor_recall": 0.7 if prefetched else float("nan"),
        "gate_mass_skipped": 0.0,
        "gate_mass_substituted": 0.0,
        "tokens": tokens,
        "steps": tokens,
        "end_ns": int(time.sum()),
        "requests": list(range(requests)),
        "request_tokens": lengths.tolist(),
        "request_ns": time.tolist(),
    }
    row |= {name: value for name, value in other.items() if name != "key"}
    row["limited_by"] = limited_by(row)
    what = [row[name] for name in ("trace", "workload", "hardware", "model", "system", "budget", "seed")]
    row["key"] = other.get("key", hashlib.sha256(json.dumps(what).encode()).hexdigest())
    return row


def make_rows(budgets=(0.125, 0.25, 0.5), **other):
    """Return a row for every system of `SYSTEMS` and every budget; less is waited for where more fits."""
    return [
        make_row(system, compute, host, wait * min(1.5, 0.25 / budget), prefetched, budget=budget, **other)
        for budget in budgets
        for system, (compute, host, wait, prefetched) in SYSTEMS.items()
    ]


def make_table(*arguments, **other):
    return pd.DataFrame(make_rows(*arguments, **other))


_SPREAD = {"mean": 1.0, "p50": 0.96, "p95": 1.31, "p99": 1.52}
