"""Is the routing learned? What a trace shows of layers, domains and reuse, each beside the same trace shuffled.

The shuffled control puts the tokens of each layer in a random order of that layer's own, over all requests. How
popular each expert is, and which experts a token combines within a layer, stays as it was. Gone is all that
ties a token's experts to the token before, to the layer before, to the request and to its domain: a figure that
the control shares is a figure of popularity alone. Beside both belongs the same architecture untrained, which is
a recording of its own (`docs/reference_model.md`): random routers repeat themselves, and flatter caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table

from traces.checks import present_arrays
from traces.statistics import Overlap, Recall, cache_curves, lag_overlap, lookahead_recall, spread_layers
from traces.trace import Provenance, Trace

REUSE_WITHIN = (1, 2, 4, 8, 16, 32, 64)
"""Tokens back, for reuse distances."""

_DEALS = 20
"""Times that domains are dealt out anew, for the mean."""

_CACHE_SHARE = 0.25
"""Of a layer's experts, for the caches of the summary."""


@dataclass(frozen=True)
class Reuse:
    """How long ago a request last used the expert that it uses now, in the same layer; over all uses."""

    within: tuple[int, ...]
    """Tokens of the request, counted back; 1 is the token before."""
    share: tuple[float, ...]
    """Share of uses that come again within so many tokens."""
    first: float
    """Share of uses that are the request's first of their expert."""
    median: float | None
    """Tokens, of the uses that are not; None where all are first."""


@dataclass(frozen=True)
class Domains:
    """How far a request's domain decides which experts it uses. Requests without a domain are left out."""

    names: tuple[str, ...]
    hottest_shared: tuple[tuple[float, ...], ...]
    """[domain][domain]: share of the hottest quarter of experts that two domains have in common, mean of layers."""
    information: tuple[float, ...]
    """Mutual information of one use's expert and its domain in bits, of each layer."""
    dealt_anew: float | None
    """Mean information over layers when the domains are dealt out anew to the requests: what requests alone give.

    None where each domain has one request: dealing then only renames the domains.
    """

    @property
    def apart(self) -> float:
        """Mean of `hottest_shared` over all pairs of different domains."""
        shared = np.array(self.hottest_shared)
        return float(shared[~np.eye(len(shared), dtype=bool)].mean())


@dataclass(frozen=True)
class Evidence:
    """Figures of a trace and of its shuffled control."""

    recall: Recall | None
    shuffled_recall: Recall | None
    """Both None where the trace has no lookahead."""
    overlap: Overlap
    shuffled_overlap: Overlap
    reuse: Reuse
    shuffled_reuse: Reuse
    domains: Domains | None
    shuffled_domains: Domains | None
    """Both None where the trace does not have at least two domains."""
    lru: float
    """Hits of one LRU cache per layer that holds a quarter of its experts, mean of 8 layers."""
    shuffled_lru: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures as dictionaries, lists, texts and numbers."""
        return dataclasses.asdict(self)


def find_evidence(trace: Trace, seed: int = 0) -> Evidence:
    """Return the evidence that `trace` gives; `seed` is that of the control."""
    control = shuffled(trace, seed)
    layers = spread_layers(trace.model.layers, 8)
    hits = [cache_curves(one, layers, (_CACHE_SHARE,), seed).lru[0] for one in (trace, control)]
    return Evidence(
        recall=lookahead_recall(trace),
        shuffled_recall=lookahead_recall(control),
        overlap=lag_overlap(trace),
        shuffled_overlap=lag_overlap(control),
        reuse=reuse_distances(trace),
        shuffled_reuse=reuse_distances(control),
        domains=domain_separation(trace, seed),
        shuffled_domains=domain_separation(control, seed),
        lru=hits[0],
        shuffled_lru=hits[1],
    )


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """Return the control: `trace` with each layer's tokens in a random order of that layer's own.

    Experts and weights, where these are known, move together; lookahead stays where it was, and foretells what is no
    longer there. Requests, domains, positions and steps stay too. Logits, norms and cosines are left out.
    """
    rng = np.random.default_rng(seed)
    arrays = present_arrays(trace)
    moved: dict[str, Any] = {name: np.array(arrays[name]) for name in ("experts", "weights") if name in arrays}
    for layer in range(trace.model.layers):
        order = rng.permutation(trace.tokens)
        for array in moved.values():
            array[:, layer] = array[order, layer]
    return replace(
        trace,
        **moved,
        router_logits=None,
        expert_output_norm=None,
        residual_cosine=None,
        provenance=Provenance(
            "synthetic",
            f"a shuffled control of: {trace.provenance.source}",
            "foregate traces.evidence 1",
            {"part_of": {"hash": trace.hash}, "seed": seed},
        ),
        hash="",
    )


def reuse_distances(trace: Trace) -> Reuse:
    """Return how long ago experts were last used by the same request."""
    distances = _distances(trace)
    uses = max(1, int((distances >= 0).sum()))
    again = distances[distances > 0]
    return Reuse(
        within=REUSE_WITHIN,
        share=tuple(float((again <= tokens).sum() / uses) for tokens in REUSE_WITHIN),
        first=float((distances == 0).sum() / uses),
        median=float(np.median(again)) if again.size else None,
    )


def _distances(trace: Trace) -> npt.NDArray[np.int64]:
    """Return [T, L, K]: tokens since the request's last use of the expert, 0 for its first, -1 for no expert."""
    tokens, layers, _ = trace.experts.shape
    row = np.arange(layers)[:, None]
    distances = np.empty(trace.experts.shape, np.int64)
    last_use = np.full((len(trace.domains), layers, trace.model.experts + 1), -1, np.int64)
    for token in range(tokens):
        of_request, chosen, now = last_use[trace.request[token]], trace.experts[token], int(trace.position[token])
        before = of_request[row, chosen]
        distances[token] = np.where(before < 0, 0, now - before)
        of_request[row, chosen] = now
    # The -1 of a missing expert indexed a last column that no expert has.
    distances[trace.experts < 0] = -1
    return distances


def domain_separation(trace: Trace, seed: int = 0) -> Domains | None:
    """Return how far domains use different experts; None where fewer than two domains are known."""
    names = tuple(dict.fromkeys(domain for domain in trace.domains if domain))
    if len(names) < 2:
        return None
    number = np.array([names.index(domain) if domain else -1 for domain in trace.domains])
    of_request = _uses_of_requests(trace)
    known = np.flatnonzero((number >= 0) & (of_request.sum(axis=(1, 2)) > 0))
    of_request, number = of_request[known], number[known]
    uses = _uses_of_domains(of_request, number, len(names))
    return Domains(
        names=names,
        hottest_shared=tuple(map(tuple, _hottest_shared(uses).tolist())),
        information=tuple(_information(uses).tolist()),
        dealt_anew=_dealt_anew(of_request, number, len(names), seed) if len(number) > len(names) else None,
    )


def _dealt_anew(of_request: npt.NDArray[np.int64], number: npt.NDArray[np.int64], count: int, seed: int) -> float:
    """Return the mean information over layers and deals; `number` is the domain of each request, of `count` domains."""
    rng = np.random.default_rng(seed)
    deals = [_uses_of_domains(of_request, rng.permutation(number), count) for _ in range(_DEALS)]
    return float(np.mean([_information(uses) for uses in deals]))


def _uses_of_requests(trace: Trace) -> npt.NDArray[np.int64]:
    """Return [N, L, E]: how often each request used each expert."""
    requests, layers, experts = len(trace.domains), trace.model.layers, trace.model.experts
    used = trace.experts >= 0
    place = (trace.request[:, None, None].astype(np.int64) * layers + np.arange(layers)[:, None]) * experts + trace.experts
    return np.bincount(place[used], minlength=requests * layers * experts).reshape(requests, layers, experts)


def _uses_of_domains(of_request: npt.NDArray[np.int64], number: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return [domain, L, E] from [N, L, E] and the domain of each request."""
    uses = np.zeros((count, *of_request.shape[1:]), np.int64)
    np.add.at(uses, number, of_request)
    return uses


def _hottest_shared(uses: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return [domain, domain] from the uses [domain, L, E]."""
    quarter = max(1, uses.shape[-1] // 4)
    # A stable sort breaks ties for the lower id, in every domain alike.
    hottest = np.argsort(-uses, axis=-1, kind="stable")[..., :quarter]
    marked = np.zeros(uses.shape, np.float64)
    np.put_along_axis(marked, hottest, 1.0, axis=-1)
    return np.asarray(np.einsum("ale,ble->ab", marked, marked) / (quarter * uses.shape[1]))


def _information(uses: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return [L]: the mutual information of domain and expert in bits, from the uses [domain, L, E]."""
    joint = uses / np.maximum(1, uses.sum(axis=(0, 2), keepdims=True))
    independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = joint * np.log2(joint / independent)
    return np.asarray(np.nan_to_num(terms).sum(axis=(0, 2)))


# --- tables ---------------------------------------------------------------------------------------------


def render_evidence(found: Evidence) -> RenderableType:
    """Return the evidence as tables for the terminal."""
    tables = [render_layers(found), _overlap_table(found), _reuse_table(found)]
    if found.domains is not None:
        tables.append(_domain_table(found.domains))
    return Group(*tables)


def render_layers(found: Evidence, name: str = "") -> Table:
    """Return the figures of each layer as a table; `name` says of which trace, where there are several."""
    table = Table(title=f"{name}: {_layer_title(found)}" if name else _layer_title(found))
    table.add_column("layer")
    columns: list[tuple[str, Sequence[float | None], Sequence[float | None]]] = []
    if found.recall is not None and found.shuffled_recall is not None:
        for depth, (layers, control) in enumerate(zip(found.recall.by_layer, found.shuffled_recall.by_layer, strict=True)):
            columns.append((f"foretold d={depth + 1}", layers[0], control[0]))
    columns.append(("token before", found.overlap.by_layer[0], found.shuffled_overlap.by_layer[0]))
    if found.domains is not None and found.shuffled_domains is not None:
        columns.append(("domain, bits", found.domains.information, found.shuffled_domains.information))
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for layer in range(len(found.overlap.by_layer[0])):
        table.add_row(str(layer), *(_figure(values[layer]) for _, values, _ in columns))
    table.add_section()
    table.add_row("mean", *(_figure(_mean(values)) for _, values, _ in columns))
    table.add_row("mean, shuffled", *(_figure(_mean(control)) for _, _, control in columns))
    return table


def _layer_title(found: Evidence) -> str:
    if found.recall is None:
        return "experts shared with the token before, and what they say of the domain"
    return (
        f"routed experts among the best {found.recall.widths[0]} that layer l foretells for layer l + d"
        f" ({found.recall.phase} tokens), shared with the token before, and what they say of the domain"
    )


def _overlap_table(found: Evidence) -> Table:
    table = Table(title=f"experts shared with an earlier token (chance {found.overlap.chance:.3f})")
    table.add_column("tokens back")
    for lag in found.overlap.lags:
        table.add_column(str(lag), justify="right")
    table.add_row("as recorded", *map(_figure, found.overlap.mean))
    table.add_row("shuffled", *map(_figure, found.shuffled_overlap.mean))
    return table


def _reuse_table(found: Evidence) -> Table:
    table = Table(title="uses of an expert that the request used before, within so many tokens")
    table.add_column("tokens back")
    for tokens in found.reuse.within:
        table.add_column(f"{tokens}", justify="right")
    for title in ("median", "first uses"):
        table.add_column(title, justify="right")
    for name, reuse in (("as recorded", found.reuse), ("shuffled", found.shuffled_reuse)):
        median = "-" if reuse.median is None else f"{reuse.median:.0f}"
        table.add_row(name, *map(_figure, reuse.share), median, _figure(reuse.first))
    return table


def _domain_table(domains: Domains) -> Table:
    table = Table(title="hottest quarter of experts that two domains share (chance 0.25)")
    table.add_column("domain")
    for name in domains.names:
        table.add_column(name, justify="right")
    for name, shared in zip(domains.names, domains.hottest_shared, strict=True):
        table.add_row(name, *map(_figure, shared))
    return table


def render_summary(found: Sequence[tuple[str, Evidence]]) -> RenderableType:
    """Return one table: a row per figure, and per trace a column as recorded and one shuffled."""
    table = Table(title="evidence that routing is learned")
    table.add_column("figure")
    for name, _ in found:
        table.add_column(name, justify="right")
        table.add_column("shuffled", justify="right")
    columns = [column for _, one in found for column in (_summary(one, shuffled=False), _summary(one, shuffled=True))]
    for title in dict.fromkeys(title for column in columns for title in column):
        table.add_row(title, *(column.get(title, "-") for column in columns))
    return table


def _summary(found: Evidence, *, shuffled: bool) -> dict[str, str]:
    """Return the figures of one column by the titles of their rows."""
    recall = found.shuffled_recall if shuffled else found.recall
    overlap = found.shuffled_overlap if shuffled else found.overlap
    reuse = found.shuffled_reuse if shuffled else found.reuse
    domains = found.shuffled_domains if shuffled else found.domains
    rows: dict[str, str] = {}
    for depth, shares in enumerate(recall.mean if recall else (), start=1):
        rows[f"foretold {depth} ahead, best k"] = _figure(shares[0])
    rows["shared, uniform chance"] = _figure(overlap.chance)
    for lag in (1, 8, 64):
        rows[f"shared with the token {lag} back"] = _figure(overlap.mean[overlap.lags.index(lag)])
    rows["used again within 8 tokens"] = _figure(reuse.share[reuse.within.index(8)])
    rows["median tokens to reuse"] = "-" if reuse.median is None else f"{reuse.median:.0f}"
    if domains is not None:
        rows["domain in one use, bits"] = _figure(_mean(domains.information))
        rows["the same, domains dealt anew"] = _figure(domains.dealt_anew)
        rows["hottest quarter shared"] = _figure(domains.apart)
    rows["LRU hits, a quarter per layer"] = _figure(found.shuffled_lru if shuffled else found.lru)
    return rows


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
