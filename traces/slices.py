"""Parts of a trace and parts put together: some requests, the first so many tokens, one recording out of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.checks import ARRAYS, present_arrays
from traces.errors import InputError
from traces.trace import Provenance, Trace


def slice_requests(trace: Trace, requests: Sequence[int]) -> Trace:
    """Return the part of `trace` that belongs to `requests`, in the trace's own order of tokens.

    The i-th of `requests` becomes request i, and the steps that are left are numbered from 0. Arrays are
    views where the tokens lie together. The part has no hash of its own; its provenance names the whole.

    Raises `InputError` for a request that is not there, is named twice, or when none is named.
    """
    chosen = np.asarray(requests, dtype=np.int64)
    if chosen.size == 0:
        raise InputError("requests: none is named; name at least one request to keep")
    there = set(np.unique(trace.request).tolist())
    for request in chosen.tolist():
        if request not in there:
            raise InputError(f"requests: {request} has no tokens in this trace; it has {len(there)} requests")
    if len(np.unique(chosen)) != chosen.size:
        raise InputError(f"requests: {list(requests)} names a request twice; each may be named once")
    return _part(trace, np.flatnonzero(np.isin(trace.request, chosen)), chosen)


def split_requests(trace: Trace) -> tuple[list[int], list[int]]:
    """Return the requests of `trace` in two parts that share none: every other one, counted domain by domain.

    Both parts so have half of every domain, give or take one request. Requests without tokens are in neither. Raises
    `InputError` where there is only one.
    """
    requests = sorted(np.unique(trace.request).tolist(), key=lambda request: (trace.domains[request], request))
    if len(requests) < 2:
        raise InputError("the trace has one request: it takes two to split it into parts that share none")
    return sorted(requests[::2]), sorted(requests[1::2])


def take_tokens(trace: Trace, count: int) -> Trace:
    """Return the first requests of `trace` that make `count` tokens, the last one cut to fit.

    A trace of at most `count` tokens is returned as it is. Otherwise as `slice_requests`, the requests
    being those that begin first.

    Raises `InputError` when `count` is less than 1.
    """
    if count < 1:
        raise InputError(f"count: {count} tokens; take at least 1")
    if trace.tokens <= count:
        return trace
    found, first = np.unique(trace.request, return_index=True)
    in_order = found[np.argsort(first)].astype(np.int64)
    lengths = np.bincount(trace.request)[in_order]
    needed = int(np.searchsorted(np.cumsum(lengths), count)) + 1
    chosen = in_order[:needed]
    rows = np.flatnonzero(np.isin(trace.request, chosen))
    of_last = np.flatnonzero(trace.request[rows] == chosen[-1])
    surplus = len(rows) - count
    return _part(trace, np.delete(rows, of_last[len(of_last) - surplus :]), chosen)


def _part(trace: Trace, rows: npt.NDArray[np.int64], requests: npt.NDArray[np.int64]) -> Trace:
    """Return the tokens `rows`; the i-th of `requests` becomes request i."""
    together = int(rows[-1]) - int(rows[0]) + 1 == len(rows)
    pick = slice(int(rows[0]), int(rows[-1]) + 1) if together else rows
    arrays: dict[str, Any] = {name: array[pick] for name, array in present_arrays(trace).items()}
    number = np.full(len(trace.domains), -1, np.int32)
    number[requests] = np.arange(len(requests), dtype=np.int32)
    arrays["request"] = number[arrays["request"]]
    arrays["step"] = np.unique(arrays["step"], return_inverse=True)[1].astype(np.int32)
    return replace(
        trace,
        **arrays,
        domains=tuple(trace.domains[request] for request in requests.tolist()),
        provenance=_part_provenance(trace, len(rows), len(requests)),
        hash="",
    )


def _part_provenance(trace: Trace, tokens: int, requests: int) -> Provenance:
    # A part of a part names the file that exists, not the part in memory between.
    whole = trace.hash or trace.provenance.details.get("part_of", {}).get("hash", "")
    part = {"hash": whole, "tokens": tokens, "requests": requests}
    return replace(trace.provenance, details={**trace.provenance.details, "part_of": part})


def first_tokens(trace: Trace, count: int) -> Trace:
    """Return the first `count` tokens of every request of `trace`; shorter requests stay whole.

    Raises `InputError` when no token is left.
    """
    order = np.lexsort((trace.position, trace.request))
    ranks = np.empty(trace.tokens, np.int64)
    lengths = np.bincount(trace.request, minlength=len(trace.domains))
    ranks[order] = np.arange(trace.tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.flatnonzero(ranks < count)
    if len(rows) == 0:
        raise InputError(f"count: {count} tokens of each request; take at least 1")
    return _part(trace, rows, np.arange(len(trace.domains)))


def one_after_another(trace: Trace) -> Trace:
    """Return `trace` as if its requests had run one after another, not in batches: each pass is one request's.

    What the router chose stays: it depends on a request's own tokens. The result has no hash of its own.
    """
    order = np.lexsort((trace.position, trace.request))
    arrays: dict[str, Any] = {name: array[order] for name, array in present_arrays(trace).items()}
    passes = np.stack([arrays["request"], arrays["step"]])
    begins = np.ones(trace.tokens, bool)
    begins[1:] = (passes[:, 1:] != passes[:, :-1]).any(axis=0)
    arrays["step"] = (np.cumsum(begins) - 1).astype(np.int32)
    return replace(trace, **arrays, hash="")


def join_requests(traces: Sequence[Trace]) -> Trace:
    """Return the requests of all `traces`, one trace after another, with the first one's provenance.

    An optional array is left out where one of the traces lacks it; the whole is ranked where all are.

    Raises `InputError` when none is given, or when they are not of one model.
    """
    if not traces:
        raise InputError("traces: none is given to join; give at least one")
    for number, trace in enumerate(traces):
        if trace.model != traces[0].model:
            raise InputError(
                f"traces: number {number} is of '{trace.model.name}', the first of '{traces[0].model.name}';"
                " join parts of one recording"
            )
    present = [present_arrays(trace) for trace in traces]
    joined: dict[str, Any] = {
        name: np.concatenate([arrays[name] for arrays in present]) if all(name in arrays for arrays in present) else None
        for name in ARRAYS
    }
    for name, sizes in (
        ("request", [len(trace.domains) for trace in traces]),
        ("step", [int(trace.step[-1]) + 1 for trace in traces]),
    ):
        shift = np.repeat(np.cumsum([0, *sizes[:-1]]), [trace.tokens for trace in traces])
        joined[name] = (joined[name] + shift).astype(np.int32)
    domains = tuple(domain for trace in traces for domain in trace.domains)
    return replace(traces[0], **joined, domains=domains, ranked=all(trace.ranked for trace in traces), hash="")
