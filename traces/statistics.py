"""What a trace's routing is like: how skewed, how repetitive, how predictable, how well it caches.

All figures describe the routing alone. One token is one event (`cache_curves` judges a token's experts
against the cache as it was when the token began), whatever steps the tokens shared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table

from traces.errors import InputError
from traces.trace import DECODE, Array, Trace

LAGS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens back, for the overlap of a token's experts with an earlier token's."""

FRACTIONS = (0.10, 0.125, 0.25, 0.50, 0.75)
"""Cache sizes, as shares of a layer's experts."""

WIDTHS = (1.0, 1.5, 2.0)
"""How many experts are predicted, in multiples of top-k."""

CACHE_LAYERS = 8
"""Layers whose caches are simulated: enough for a mean, and 3 times faster than all of a usual model."""

Ids = npt.NDArray[np.int64]
Rates = npt.NDArray[np.float64]
_Bits = npt.NDArray[np.uint64]
_BLOCK_SCORES = 2_000_000
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Popularity:
    """How evenly experts are used, over the whole trace; one value per layer."""

    entropy: tuple[float, ...]
    """Entropy of the uses as a share of the largest possible; 1 is even use."""
    hottest_quarter: tuple[float, ...]
    """Share of uses that go to the most used quarter of the experts."""


@dataclass(frozen=True)
class Overlap:
    """Share of a token's experts that the same request's token `lag` tokens earlier used too."""

    lags: tuple[int, ...]
    mean: tuple[float | None, ...]
    """Over all layers; None where every request is too short."""
    by_layer: tuple[tuple[float | None, ...], ...]
    """[lag][layer]"""
    chance: float
    """The same for independent uniform choices: k / E, k being the mean number of experts used."""


@dataclass(frozen=True)
class CacheCurves:
    """Hit rates of one cache per layer, filled from empty, tokens in order, kept across requests."""

    layers_sampled: tuple[int, ...]
    """The layers simulated; each figure is their mean."""
    fractions: tuple[float, ...]
    """Cache sizes as shares of a layer's experts."""
    slots: tuple[int, ...]
    """The same in experts, rounded, at least one."""
    lru: tuple[float, ...]
    belady: tuple[float, ...]
    """The most hits possible: an expert may leave at the end of the very token that loaded it."""
    lru_by_layer: tuple[tuple[float, ...], ...]
    """[fraction][sampled layer]"""
    belady_by_layer: tuple[tuple[float, ...], ...]
    """[fraction][sampled layer]"""
    lru_sequential: tuple[float, ...] | None
    """LRU by sequential replay, as in older papers: a token's experts evict one another while it runs, lightest first.
    None where the trace does not say which expert is the lightest."""
    random_lru: tuple[float, ...]
    """LRU on uniform random routing of the same shape: what a cache of this size gives for nothing."""
    random_lru_sequential: tuple[float, ...]
    """The same control for `lru_sequential`."""


@dataclass(frozen=True)
class Recall:
    """Share of the routed experts that the gate of layer l + d, applied at layer l, ranks among its best."""

    phase: str
    """Which tokens: ``decode``, or ``prefill`` in a trace without decode."""
    widths: tuple[int, ...]
    """How many of the best count as predicted: k, 1.5 k and 2 k."""
    mean: tuple[tuple[float | None, ...], ...]
    """[d - 1][width] over all layers that predict."""
    by_layer: tuple[tuple[tuple[float | None, ...], ...], ...]
    """[d - 1][width][layer l that predicts]; None where nothing was predicted."""


@dataclass(frozen=True)
class TraceStatistics:
    """Everything `inspect_trace` finds. `as_json` gives plain JSON values."""

    model: str
    kind: str
    """``recorded``, ``imported`` or ``synthetic``."""
    tokens: int
    decode_tokens: int
    requests: int
    steps: int
    layers: int
    experts: int
    top_k: int
    unknown: tuple[str, ...]
    """What the trace does not hold though every router has it: gate weights, the order of a token's experts."""
    popularity: Popularity
    overlap: Overlap
    caches: CacheCurves
    recall: Recall | None
    """None where the trace has no lookahead."""

    def as_json(self) -> dict[str, Any]:
        """Return the statistics as dictionaries, lists, texts and numbers."""
        return dataclasses.asdict(self)


def inspect_trace(
    trace: Trace,
    *,
    layers: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    lags: Sequence[int] = LAGS,
    seed: int = 0,
) -> TraceStatistics:
    """Return the statistics of `trace`'s routing.

    `layers` are those whose caches are simulated, by default 8 spread evenly; `fractions` the cache sizes as
    shares of a layer's experts; `lags` the distances, in tokens, at which overlap is measured; `seed` that
    of the random control.

    Raises `InputError` for a layer, fraction or lag that cannot be.
    """
    model = trace.model
    sampled = spread_layers(model.layers, CACHE_LAYERS) if layers is None else tuple(layers)
    _check_options(model.layers, sampled, fractions, lags)
    return TraceStatistics(
        model=model.name,
        kind=trace.provenance.kind,
        tokens=trace.tokens,
        decode_tokens=int(np.count_nonzero(trace.phase == DECODE)),
        requests=len(np.unique(trace.request)),
        steps=trace.steps,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        unknown=_unknown(trace),
        popularity=popularity(trace),
        overlap=lag_overlap(trace, lags),
        caches=cache_curves(trace, sampled, fractions, seed),
        recall=lookahead_recall(trace),
    )


def _unknown(trace: Trace) -> tuple[str, ...]:
    there = {"gate weights": trace.weights is not None, "order of a token's experts": trace.ranked}
    return tuple(name for name, known in there.items() if not known)


def _check_options(layers: int, sampled: Sequence[int], fractions: Sequence[float], lags: Sequence[int]) -> None:
    for layer in sampled:
        if not 0 <= layer < layers:
            raise InputError(f"layers: {layer} is none of this trace's; they are 0 to {layers - 1}")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"fractions: {fraction} is no share of experts; it must be above 0, at most 1")
    for lag in lags:
        if lag < 1:
            raise InputError(f"lags: {lag} tokens back; it must be at least 1")


def spread_layers(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` layers spread evenly over `layers`, beginning with the first; all when fewer."""
    count = min(count, layers)
    return tuple(layer * layers // count for layer in range(count))


def popularity(trace: Trace) -> Popularity:
    """Return how evenly each layer's experts are used."""
    experts = trace.model.experts
    entropy, hottest = [], []
    for layer in range(trace.model.layers):
        chosen = np.asarray(trace.experts[:, layer]).ravel()
        uses = np.bincount(chosen[chosen >= 0], minlength=experts)
        share = np.sort(uses / max(1, uses.sum()))[::-1]
        used = share[share > 0]
        entropy.append(float(-(used * np.log(used)).sum() / math.log(experts)) if experts > 1 else 1.0)
        hottest.append(float(share[: max(1, experts // 4)].sum()))
    return Popularity(tuple(entropy), tuple(hottest))


def lag_overlap(trace: Trace, lags: Sequence[int] = LAGS) -> Overlap:
    """Return how many of a token's experts an earlier token of the same request used too."""
    order = np.argsort(trace.request, kind="stable")
    request = trace.request[order]
    bits = expert_bits(trace.experts, trace.model.experts)[order]
    used = np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)
    by_layer = [_overlap_at(lag, request, bits, used) for lag in lags]
    return Overlap(
        lags=tuple(lags),
        mean=tuple(_mean(layers) for layers in by_layer),
        by_layer=tuple(by_layer),
        chance=float(used.mean() / trace.model.experts),
    )


def _overlap_at(lag: int, request: Array, bits: _Bits, used: Ids) -> tuple[float | None, ...]:
    """Return the overlap of each layer at `lag`; tokens of a request lie together in all arrays."""
    same = request[lag:] == request[:-lag]
    shared = np.bitwise_count(bits[lag:][same] & bits[:-lag][same]).sum(axis=-1, dtype=np.int64)
    return _shares(shared.sum(axis=0), used[lag:][same].sum(axis=0))


def expert_bits(ids: Array, experts: int) -> _Bits:
    """Return [..., W] words with bit e of word e // 64 set for each id e on the last axis of `ids`."""
    words = np.zeros((*ids.shape[:-1], -(-experts // 64)), np.uint64)
    for rank in range(ids.shape[-1]):
        chosen = ids[..., rank]
        bit = np.left_shift(np.uint64(1), (chosen & 63).astype(np.uint64))
        for word in range(words.shape[-1]):
            # An id of -1 belongs to word -1, and so to none.
            words[..., word] |= np.where(chosen >> 6 == word, bit, np.uint64(0))
    return words


def lookahead_recall(trace: Trace) -> Recall | None:
    """Return how well layer l's gate input foretells the experts of layer l + d; None without lookahead.

    Decode tokens count, or all tokens of a trace that has none.
    """
    ids = trace.lookahead_experts
    if ids is None:
        return None
    decode = trace.phase == DECODE
    rows = np.flatnonzero(decode) if decode.any() else np.arange(trace.tokens)
    top_k, experts = trace.model.top_k, trace.model.experts
    widths = tuple(min(round(width * top_k), ids.shape[-1]) for width in WIDTHS)
    routed = expert_bits(trace.experts[rows], experts)
    by_layer = []
    for depth in range(1, ids.shape[2] + 1):
        predicted = ids[rows, :, depth - 1]
        by_layer.append(tuple(_recall_at(depth, predicted[..., :width], routed, experts) for width in widths))
    return Recall(
        phase="decode" if decode.any() else "prefill",
        widths=widths,
        mean=tuple(tuple(_mean(layers) for layers in depth) for depth in by_layer),
        by_layer=tuple(by_layer),
    )


def _recall_at(depth: int, predicted: Array, routed: _Bits, experts: int) -> tuple[float | None, ...]:
    """Return the recall of each predicting layer: [T, L, width] ids against [T, L, W] routed experts."""
    sources = predicted.shape[1] - depth
    made = (predicted[:, :sources] != -1).any(axis=-1)
    bits = expert_bits(predicted[:, :sources], experts)
    target = routed[:, depth:]
    found = np.bitwise_count(bits & target).sum(axis=-1, dtype=np.int64)
    wanted = np.bitwise_count(target).sum(axis=-1, dtype=np.int64) * made
    return _shares(found.sum(axis=0), wanted.sum(axis=0)) + (None,) * depth


def cache_curves(trace: Trace, layers: Sequence[int], fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> CacheCurves:
    """Return what one cache per layer would hit, for LRU, for Belady and for LRU on random routing."""
    experts = trace.model.experts
    slots = tuple(max(1, round(fraction * experts)) for fraction in fractions)
    routed = np.ascontiguousarray(trace.experts[:, list(layers)], dtype=np.int64)
    random = uniform_routing(routed.shape, experts, np.random.default_rng(seed))
    lru, lru_sequential = (_hits_of_depths(depths, routed, slots) for depths in lru_depths(routed, experts))
    control = [_hits_of_depths(depths, random, slots) for depths in lru_depths(random, experts)]
    belady = belady_hits(routed, experts, slots)
    return CacheCurves(
        layers_sampled=tuple(layers),
        fractions=tuple(fractions),
        slots=slots,
        lru=_layer_mean(lru),
        belady=_layer_mean(belady),
        lru_by_layer=tuple(map(tuple, lru.tolist())),
        belady_by_layer=tuple(map(tuple, belady.tolist())),
        lru_sequential=_layer_mean(lru_sequential) if trace.ranked else None,
        random_lru=_layer_mean(control[0]),
        random_lru_sequential=_layer_mean(control[1]),
    )


def uniform_routing(shape: tuple[int, ...], experts: int, rng: np.random.Generator) -> Ids:
    """Return [T, L, K] ids: K different experts for each token and layer, all sets equally likely."""
    tokens, layers, top_k = shape
    chosen = np.empty(shape, np.int64)
    rows = max(1, _BLOCK_SCORES // (layers * experts))
    for start in range(0, tokens, rows):
        scores = rng.random((min(rows, tokens - start), layers, experts))
        # The first K of a random order are a uniform choice of K.
        chosen[start : start + rows] = np.argsort(scores, axis=-1)[..., :top_k]
    return chosen


def lru_depths(routed: Ids, experts: int) -> tuple[Ids, Ids]:
    """Return two [T, L, K]: how many other experts of the layer were used more recently than this one.

    A cache of C slots that evicts the least recently used expert hits exactly where the depth is below C.
    The first array judges a token's experts at the token's start. The second is sequential replay: lightest
    first, each expert is judged when those before it are already in the cache. Either way the heaviest
    expert of a token counts as its most recent. The depth of an expert that was never used, or of no expert
    (-1), is at least `experts`.
    """
    tokens, layers, top_k = routed.shape
    row = np.arange(layers)[:, None]
    lighter = np.arange(top_k) > np.arange(top_k)[:, None]
    # The -1 of a missing expert indexes a last column that no real expert shares.
    last_use = np.full((layers, experts + 1), -1, np.int64)
    at_start, sequential = np.empty(routed.shape, np.int64), np.empty(routed.shape, np.int64)
    for token in range(tokens):
        chosen = routed[token]
        mine = last_use[row, chosen]
        newer = (last_use[:, None, :experts] > mine[:, :, None]).sum(axis=-1)
        at_start[token] = np.where((mine < 0) | (chosen < 0), experts, newer)
        # Lighter experts of this token that were the older ones have just moved in front.
        moved = (mine[:, None, :] < mine[:, :, None]) & lighter & (chosen >= 0)[:, None, :]
        sequential[token] = at_start[token] + moved.sum(axis=-1)
        last_use[row, chosen] = np.arange((token + 1) * top_k, token * top_k, -1)
    return at_start, sequential


def belady_hits(routed: Ids, experts: int, slots: Sequence[int]) -> Rates:
    """Return [capacity, L] hit rates of a cache that keeps the experts whose next use is soonest."""
    tokens, layers, _ = routed.shape
    row = np.arange(layers)[:, None]
    upcoming = _next_uses(routed, experts)
    # As in `lru_depths`, the last column takes what is said of the missing expert, -1.
    next_use = np.full((layers, experts + 1), _NEVER, np.int64)
    resident = np.zeros((len(slots), layers, experts + 1), bool)
    hits = np.zeros((len(slots), layers), np.int64)
    for token in range(tokens):
        chosen = routed[token]
        hits += resident[:, row, chosen].sum(axis=-1)
        next_use[row, chosen] = upcoming[token]
        resident[:, row, chosen] = True
        resident[:, :, experts] = False
        _evict_latest(resident, next_use, np.asarray(slots)[:, None])
    return _hit_rates(hits, routed)


def _next_uses(routed: Ids, experts: int) -> Ids:
    """Return [T, L, K]: the next token that uses the same expert in the same layer."""
    tokens, layers, _ = routed.shape
    row = np.arange(layers)[:, None]
    following = np.full((layers, experts + 1), _NEVER, np.int64)
    upcoming = np.empty(routed.shape, np.int64)
    for token in range(tokens - 1, -1, -1):
        upcoming[token] = following[row, routed[token]]
        following[row, routed[token]] = token
    return upcoming


def _evict_latest(resident: npt.NDArray[np.bool_], next_use: Ids, sizes: Ids) -> None:
    """Take experts out of the full caches of `resident` [capacity, L, E + 1], latest next use first."""
    surplus = resident.sum(axis=-1) - sizes
    capacity, layer = np.nonzero(surplus > 0)
    surplus = surplus[capacity, layer]
    # One expert leaves each overfull cache per round; at most K rounds.
    while len(capacity):
        candidates = np.where(resident[capacity, layer], next_use[layer], -1)
        resident[capacity, layer, candidates.argmax(axis=-1)] = False
        surplus = surplus - 1
        still = surplus > 0
        capacity, layer, surplus = capacity[still], layer[still], surplus[still]


def _hits_of_depths(depths: Ids, routed: Ids, slots: Sequence[int]) -> Rates:
    """Return [capacity, L] hit rates of LRU caches from `lru_depths`."""
    hits = np.stack([(depths < size).sum(axis=(0, 2)) for size in slots])
    return _hit_rates(hits, routed)


def _hit_rates(hits: Ids, routed: Ids) -> Rates:
    uses = np.maximum(1, (routed >= 0).sum(axis=(0, 2)))
    return np.asarray(hits / uses, np.float64)


def _layer_mean(hits: Rates) -> tuple[float, ...]:
    return tuple(hits.mean(axis=1).tolist())


def _shares(part: Ids, whole: Ids) -> tuple[float | None, ...]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return tuple(some / every if every else None for some, every in pairs)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def render_statistics(found: TraceStatistics) -> RenderableType:
    """Return the statistics as tables for the terminal. A synthetic trace says so in the title."""
    tables = [_summary_table(found), _overlap_table(found.overlap), _cache_table(found)]
    if found.recall is not None:
        tables.append(_recall_table(found.recall))
    return Group(*tables)


def _summary_table(found: TraceStatistics) -> Table:
    mark = "SYNTHETIC, " if found.kind == "synthetic" else ""
    table = Table(title=f"{found.model} ({mark}{found.kind} trace)", show_header=False)
    table.add_row("layers x experts, top-k", f"{found.layers} x {found.experts}, {found.top_k}")
    table.add_row("tokens (decode)", f"{found.tokens:,} ({found.decode_tokens:,})")
    table.add_row("requests, steps", f"{found.requests:,}, {found.steps:,}")
    table.add_row("popularity entropy, share of the maximum", _spread(found.popularity.entropy))
    table.add_row("uses of the hottest quarter of experts", _spread(found.popularity.hottest_quarter))
    if found.unknown:
        table.add_row("not known", ", ".join(found.unknown))
    return table


def _overlap_table(overlap: Overlap) -> Table:
    table = Table(title=f"experts shared with an earlier token (chance {overlap.chance:.3f})")
    table.add_column("tokens back")
    for lag in overlap.lags:
        table.add_column(str(lag), justify="right")
    table.add_row("share, mean of layers", *map(_share, overlap.mean))
    return table


def _cache_table(found: TraceStatistics) -> Table:
    caches = found.caches
    table = Table(title=f"hits of one cache per layer (mean of {len(caches.layers_sampled)} layers)")
    table.add_column("slots per layer")
    for fraction, slots in zip(caches.fractions, caches.slots, strict=True):
        table.add_column(f"{slots} ({fraction:.3g})", justify="right")
    table.add_row("Belady", *map(_share, caches.belady))
    table.add_row("LRU", *map(_share, caches.lru))
    table.add_row("LRU, uniform random routing", *map(_share, caches.random_lru))
    if caches.lru_sequential is not None:
        table.add_row("LRU, sequential replay", *map(_share, caches.lru_sequential))
    table.add_row("LRU, sequential, uniform random", *map(_share, caches.random_lru_sequential))
    return table


def _recall_table(recall: Recall) -> Table:
    table = Table(title=f"routed experts foretold d layers ahead ({recall.phase} tokens)")
    table.add_column("d")
    for width in recall.widths:
        table.add_column(f"best {width}", justify="right")
    for depth, shares in enumerate(recall.mean, start=1):
        table.add_row(str(depth), *map(_share, shares))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(values: Sequence[float]) -> str:
    return f"{_share(_mean(values))} (layers {min(values):.3f} to {max(values):.3f})"
