"""What a run produced: integers per step from the engine, and the row of figures that is stored and compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from policies.contract import Floats, Ints
from sim.workload import Workload
from traces.trace import DECODE

KINDS = ("demand", "useful", "late", "wasted", "refresh")
"""What became of transferred bytes: fetched on demand; prefetched and there in time; prefetched, used, but still in
flight when its event started; prefetched and never used; transferred again after use (Fate's released code)."""


class StepTimes(NamedTuple):
    """Where the time of every step went, ns; compute + wait + host is the step's whole duration."""

    compute: Ints
    """[S] the compute stream was busy."""
    wait: Ints
    """[S] exposed wait: the compute stream stood still for a transfer."""
    host: Ints
    """[S] the compute stream stood still for the host thread (read-out, decision, launch)."""
    hits: Ints
    """[S] resident when their event started."""
    late_hits: Ints
    """[S] in flight when their event started."""
    misses: Ints
    """[S] neither."""

    @property
    def duration(self) -> Ints:
        """[S] ns from the end of the step before to the end of this one."""
        return self.compute + self.wait + self.host


class Run(NamedTuple):
    """One system on one trace: all integers, equal between engines."""

    steps: StepTimes
    end_ns: int
    """When the last step ended."""
    link_busy_ns: int
    """How long the link moved bytes until the last step ended."""
    bytes_by_kind: dict[str, int]
    """Bytes moved host to device, by `KINDS`."""
    prefetches: int
    """Prefetch transfers started."""
    cancelled: int
    """Prefetches given up before they were complete: their event came and did not need them, or no slot was free."""
    predicted: int
    """Experts selected by the prefetch rule for events that came, resident or not."""
    predicted_and_needed: int
    """Those that the event then needed."""
    needed_after_prediction: int
    """Experts needed by events that a prediction had been made for: the denominator of recall."""
    peak_slots: int
    """Most slots ever taken."""
    log: list[tuple[Any, ...]] | None = None
    """Every engine event when asked for: (ns, what, key, detail)."""


def metrics(run: Run, workload: Workload) -> dict[str, Any]:
    """Return the figures of one run, by column name; the units are in the names.

    TPOT is the duration of the decode step that made a token, TTFT that of all steps that process a request's prompt.
    Tokens/s counts decode tokens over the time of the steps that make them (prompt tokens in a trace without decode); the
    ms per token have the same denominator. Experts and bytes are counted over all steps, prompts included.
    Per-request lists are what the paired bootstrap resamples.
    """
    duration = run.steps.duration
    step_of_row = np.repeat(np.arange(len(workload.decode)), np.diff(workload.offsets))
    decoded = workload.trace.phase[workload.rows] == DECODE
    rows = decoded if decoded.any() else ~decoded
    counted = np.isin(np.arange(len(duration)), step_of_row[rows])
    tokens = int(rows.sum())
    time_ns = int(duration[counted].sum())
    tpot_ns = duration[step_of_row[decoded]]
    ttft_ns = _prompt_times(workload, duration, step_of_row, ~decoded)
    accesses = int(run.steps.hits.sum() + run.steps.late_hits.sum() + run.steps.misses.sum())
    requests, request_tokens, request_ns = _per_request(workload, duration, step_of_row, rows)
    row: dict[str, Any] = {
        "tokens_per_s": tokens / time_ns * 1e9 if time_ns else float("nan"),
        **_distribution("tpot_ms", tpot_ns / 1e6),
        **_distribution("ttft_ms", ttft_ns / 1e6),
        "compute_ms_per_token": int(run.steps.compute[counted].sum()) / tokens / 1e6,
        "wait_ms_per_token": int(run.steps.wait[counted].sum()) / tokens / 1e6,
        "host_ms_per_token": int(run.steps.host[counted].sum()) / tokens / 1e6,
        "link_busy_share": run.link_busy_ns / run.end_ns if run.end_ns else 0.0,
        "hits": int(run.steps.hits.sum()),
        "late_hits": int(run.steps.late_hits.sum()),
        "misses": int(run.steps.misses.sum()),
        "hit_rate": int(run.steps.hits.sum()) / accesses if accesses else float("nan"),
        **{f"{kind}_bytes": run.bytes_by_kind[kind] for kind in KINDS},
        "moved_mb_per_token": sum(run.bytes_by_kind.values()) / workload.tokens / 1e6,
        "prefetches": run.prefetches,
        "cancelled_prefetches": run.cancelled,
        "predictor_precision": _share(run.predicted_and_needed, run.predicted),
        "predictor_recall": _share(run.predicted_and_needed, run.needed_after_prediction),
        "gate_mass_skipped": 0.0,
        "gate_mass_substituted": 0.0,
        "tokens": tokens,
        "steps": len(duration),
        "end_ns": run.end_ns,
        "requests": requests,
        "request_tokens": request_tokens,
        "request_ns": request_ns,
    }
    return row


def limited_by(row: Any) -> str:
    """Say in a word what most of the time of a row goes to: ``compute``, ``wait`` (the link) or ``host``."""
    parts = {name: row[f"{name}_ms_per_token"] for name in ("compute", "wait", "host")}
    return max(parts, key=lambda name: parts[name])


def _per_request(
    workload: Workload, duration: Ints, step_of_row: Ints, rows: npt.NDArray[np.bool_]
) -> tuple[list[int], list[int], list[float]]:
    """Return request ids, their counted tokens (those of `rows`), and the time these took (steps shared equally)."""
    sharers = np.bincount(step_of_row[rows], minlength=len(duration))
    share = duration[step_of_row[rows]] / sharers[step_of_row[rows]]
    requests, place = np.unique(workload.request[rows], return_inverse=True)
    tokens = np.bincount(place, minlength=len(requests))
    time_ns = np.bincount(place, weights=share, minlength=len(requests))
    return requests.tolist(), tokens.tolist(), time_ns.tolist()


def _prompt_times(workload: Workload, duration: Ints, step_of_row: Ints, prompt: npt.NDArray[np.bool_]) -> Ints:
    """Return the time of every request's prompt: of all steps that process a part of it."""
    passes = np.unique(np.stack([workload.request[prompt], step_of_row[prompt]]), axis=1)
    _, place = np.unique(passes[0], return_inverse=True)
    times = np.zeros(int(place.max(initial=-1)) + 1, np.int64)
    np.add.at(times, place, duration[passes[1]])
    return times


def _distribution(name: str, values: Floats) -> dict[str, float]:
    """Return mean and percentiles of `values` under ``name_mean``, ``name_p50``, ...; NaN where there is none."""
    if len(values) == 0:
        return {f"{name}_{part}": float("nan") for part in ("mean", "p50", "p95", "p99")}
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_p50": float(p50),
        f"{name}_p95": float(p95),
        f"{name}_p99": float(p99),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
