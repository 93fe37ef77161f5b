"""Triton kernels of the replay decoder: routing that the host can read, and experts by slot.

They are small on purpose: at batch 1 to 4 an expert is read once from memory, and that is the time it takes.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

ID_BITS = 11
"""A routed word is ``(step + 1) << ID_BITS | (expert + 1)``: one store says which expert, and that it is this step's."""


@triton.jit
def _route(
    logits,
    forced,
    step,
    gate,
    words,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    token = tl.program_id(0)
    now = tl.load(step).to(tl.int32)
    expert_ids = tl.arange(0, BLOCK)
    scores = tl.load(logits + token * E + expert_ids, mask=expert_ids < E, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(scores - tl.max(scores, 0))
    shares = exponentials / tl.sum(exponentials, 0)
    for place in range(K):
        expert = tl.load(forced + (now * N + token) * K + place)
        weight = tl.sum(tl.where(expert_ids == expert, shares, 0.0), 0)
        tl.store(gate + token * K + place, weight)
        tl.store(words + token * K + place, ((now + 1) << BITS) | (expert + 1))


@triton.jit
def _take_row(ring, turn, slots, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr):
    now = tl.load(turn)
    places = tl.arange(0, BLOCK)
    row = tl.load(ring + (now % RING) * WIDTH + places, mask=places < WIDTH, other=-1)
    tl.store(slots + places, row, mask=places < WIDTH)
    tl.store(turn, now + 1)


@triton.jit
def _take_list(source, target, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places, mask=places < count, other=0).to(tl.int64), mask=places < count)


@triton.jit
def _gate_up(
    hidden,
    pool,
    slots,
    activation,
    SLOT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    slot = tl.load(slots + entry).to(tl.int64)
    if slot >= 0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = rows < W
        gate_rows = pool + slot * SLOT + rows.to(tl.int64)[:, None] * H
        up_rows = gate_rows + W * H
        gate = tl.zeros((ROWS, BLOCK), tl.float32)
        up = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, H, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            some = columns < H
            x = tl.load(hidden + (entry // K) * H + columns, mask=some, other=0.0).to(tl.float32)[None, :]
            both = inside[:, None] & some[None, :]
            gate += tl.load(gate_rows + columns[None, :], mask=both, other=0.0).to(tl.float32) * x
            up += tl.load(up_rows + columns[None, :], mask=both, other=0.0).to(tl.float32) * x
        a = tl.sum(gate, 1)
        tl.store(activation + entry * W + rows, a / (1.0 + tl.exp(-a)) * tl.sum(up, 1), mask=inside)


@triton.jit
def _down(
    activation,
    pool,
    slots,
    output,
    SLOT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    slot = tl.load(slots + entry).to(tl.int64)
    if slot >= 0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = rows < H
        down_rows = pool + slot * SLOT + 2 * W * H + rows.to(tl.int64)[:, None] * W
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, W, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            some = columns < W
            x = tl.load(activation + entry * W + columns, mask=some, other=0.0)[None, :]
            total += (
                tl.load(down_rows + columns[None, :], mask=inside[:, None] & some[None, :], other=0.0).to(tl.float32) * x
            )
        tl.store(output + entry * H + rows, tl.sum(total, 1), mask=inside)


def route(logits: Any, forced: Any, step: Any, gate: Any, words: Any, top_k: int) -> None:
    """Write the ids of `forced` [S, N, K] at `step` [1] as words [n, K] that the host reads, and their gate weights [n, K].

    `logits` is [n, E]; a weight is the softmax over all experts; an id of -1 weighs nothing.
    """
    tokens, experts = logits.shape
    _route[(tokens,)](
        logits,
        forced,
        step,
        gate,
        words,
        experts,
        top_k,
        forced.shape[1],
        triton.next_power_of_2(experts),
        ID_BITS,
        num_warps=1,
    )


def take_row(ring: Any, turn: Any, slots: Any) -> None:
    """Copy row ``turn % len(ring)`` of host memory `ring` [rows, entries] to `slots` [entries], and count `turn` [1] on."""
    rows, width = ring.shape
    _take_row[(1,)](ring, turn, slots, width, triton.next_power_of_2(width), rows, num_warps=1)


def take_list(source: Any, target: Any, count: int) -> None:
    """Copy `count` numbers of host memory (int32) to the device (int64) without the copy engine, which may be busy."""
    _take_list[(triton.cdiv(count, 256),)](source, target, count, 256)


def experts_by_slot(hidden: Any, pool: Any, slots: Any, activation: Any, output: Any, top_k: int) -> None:
    """Compute ``output[e] = down(silu(gate(x)) * up(x))`` with the expert in slot ``slots[e]``; -1 leaves an entry alone.

    x is ``hidden[e // top_k]``. Shapes: hidden [n, H] and pool [slots, elements of a slot] bf16, slots [n * K] int32,
    activation [n * K, W] and output [n * K, H] fp32.
    """
    entries, width = activation.shape
    size = hidden.shape[1]
    shape = {"SLOT": pool.shape[1], "H": size, "W": width}
    _gate_up[(entries, triton.cdiv(width, 8))](
        hidden, pool, slots, activation, **shape, K=top_k, ROWS=8, BLOCK=512, num_warps=4
    )
    _down[(entries, triton.cdiv(size, 8))](activation, pool, slots, output, **shape, ROWS=8, BLOCK=512, num_warps=4)


# ---- live: a transformers model's experts ------------------------------------------------------------------------


@triton.jit
def _publish(values, turn, words, count, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    found = tl.load(values + places, mask=inside, other=0)
    bits = found.to(tl.float32).to(tl.uint32, bitcast=True) if FLOAT else found.to(tl.int32).to(tl.uint32, bitcast=True)
    tag = (tl.load(turn) + 1).to(tl.int64) << 32
    tl.store(words + places, tag | bits.to(tl.int64), mask=inside)


@triton.jit
def _enter(
    hidden,
    ids,
    weights,
    turn,
    words,
    weight_words,
    held_hidden,
    held_weights,
    E,
    H: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
):
    token = tl.program_id(0)
    tag = (tl.load(turn) + 1).to(tl.int64) << 32
    places = tl.arange(0, PLACES)
    inside = places < K
    expert = tl.load(ids + token * K + places, mask=inside, other=0).to(tl.int32)
    weight = tl.load(weights + token * K + places, mask=inside, other=0).to(tl.float32)
    absent = (expert >= E) | (expert < 0)
    order = tl.where(absent, float("-inf"), weight)
    ahead = (order[None, :] > order[:, None]) | ((order[None, :] == order[:, None]) & (places[None, :] < places[:, None]))
    rank = tl.sum((ahead & inside[None, :]).to(tl.int32), 1)
    expert = tl.where(absent, -1, expert)
    weight = tl.where(absent, 0.0, weight)
    tl.store(held_weights + token * K + rank, weight, mask=inside)
    if WITH_WEIGHTS:
        tl.store(weight_words + token * K + rank, tag | weight.to(tl.uint32, bitcast=True).to(tl.int64), mask=inside)
    for start in range(0, H, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        some = columns < H
        tl.store(held_hidden + token * H + columns, tl.load(hidden + token * H + columns, mask=some), mask=some)
    tl.store(words + token * K + rank, tag | expert.to(tl.uint32, bitcast=True).to(tl.int64), mask=inside)


@triton.jit
def _project(
    x,
    pool,
    slots,
    output,
    SLOT: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    slot = tl.load(slots + entry).to(tl.int64)
    if slot >= 0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = rows < R
        matrix = pool + slot * SLOT + OFFSET
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, C, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            some = columns < C
            values = tl.load(x + (entry // K) * C + columns, mask=some, other=0.0).to(tl.float32)[None, :]
            places = rows[:, None] + columns[None, :] * R if TRANSPOSED else rows[:, None] * C + columns[None, :]
            total += tl.load(matrix + places, mask=inside[:, None] & some[None, :], other=0.0).to(tl.float32) * values
        result = tl.sum(total, 1)
        if BIAS >= 0:
            result += tl.load(pool + slot * SLOT + BIAS + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + entry * R + rows, result, mask=inside)


@triton.jit
def _combine(y, weights, output, turn, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(K):
        weight = tl.load(weights + token * K + place)
        part = tl.load(y + (token * K + place) * H + columns, mask=inside, other=0.0)
        total += tl.where(weight == 0.0, 0.0, part * weight)
    tl.store(output + token * H + columns, total, mask=inside)
    if (token == 0) & (tl.program_id(1) == 0):
        tl.store(turn, tl.load(turn) + 1)


def publish(values: Any, turn: Any, words: Any) -> None:
    """Write `values` (contiguous) into host memory `words` (int64), each with the event's number, ``turn + 1``, above."""
    count = values.numel()
    _publish[(triton.cdiv(count, 256),)](values, turn, words, count, values.is_floating_point(), 256)


def enter(
    hidden: Any, ids: Any, weights: Any, turn: Any, words: Any, weight_words: Any, held: tuple[Any, Any], experts: int
) -> None:
    """Take what a router chose: ids (and weights) into host memory, hidden states and weights to where they are read.

    `hidden` [n, H], `ids` and `weights` [n, K], all contiguous; `held` the places for hidden states and fp32 weights. Each
    token's experts are put in descending weight; ids of no expert become -1 with weight 0. `weight_words` may be None.
    """
    tokens, size = hidden.shape
    top_k = ids.shape[1]
    _enter[(tokens,)](
        hidden,
        ids,
        weights,
        turn,
        words,
        words if weight_words is None else weight_words,
        *held,
        experts,
        size,
        top_k,
        triton.next_power_of_2(top_k),
        1024,
        weight_words is not None,
        num_warps=4,
    )


def project(x: Any, pool: Any, slots: Any, output: Any, *, offset: int, bias: int, transposed: bool, top_k: int) -> None:
    """Multiply by a matrix of the expert in each entry's slot: ``output[e] = W @ x[e // top_k] + b``; -1 leaves it alone.

    `x` [n, C], `pool` [slots, elements of a slot], `slots` [entries] int32, `output` [entries, R]. W lies at `offset` in the
    slot, [R, C], or [C, R] where `transposed`; b at `bias`, or is none where that is -1.
    """
    entries, rows = output.shape
    block = (64, 64) if transposed else (8, 512)
    _project[(entries, triton.cdiv(rows, block[0]))](
        x, pool, slots, output, pool.shape[1], offset, bias, rows, x.shape[1], transposed, top_k, *block, num_warps=4
    )


def combine(y: Any, weights: Any, output: Any, turn: Any) -> None:
    """Sum ``y[t * K + k] * weights[t, k]`` over k, in that order, into ``output[t]``, and count `turn` on."""
    tokens, top_k = weights.shape
    size = output.shape[1]
    _combine[(tokens, triton.cdiv(size, 256))](y, weights, output, turn, size, top_k, 256, num_warps=1)


@triton.jit
def _rank(
    scores,
    ids,
    turn,
    id_words,
    share_words,
    E: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LOGITS: tl.constexpr,
):
    token = tl.program_id(0)
    tag = (tl.load(turn) + 1).to(tl.int64) << 32
    mine = tl.arange(0, BLOCK)
    inside = mine < E
    score = tl.load(scores + token * E + mine, mask=inside, other=float("-inf"))
    chosen = tl.zeros((BLOCK,), tl.int32)
    for place in range(K):
        chosen += (mine == tl.load(ids + token * K + place)).to(tl.int32)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, E, CHUNK):
        others = start + tl.arange(0, CHUNK)
        there = others < E
        rival = tl.load(scores + token * E + others, mask=there, other=float("-inf"))
        picked = tl.zeros((CHUNK,), tl.int32)
        for place in range(K):
            picked += (others == tl.load(ids + token * K + place)).to(tl.int32)
        higher = (rival[None, :] > score[:, None]) | ((rival[None, :] == score[:, None]) & (others[None, :] < mine[:, None]))
        before = (picked[None, :] > chosen[:, None]) | ((picked[None, :] == chosen[:, None]) & higher)
        rank += tl.sum((before & there[None, :]).to(tl.int32), 1)
    if LOGITS:
        parts = tl.where(inside, tl.exp(score - tl.max(score, 0)), 0.0)
    else:
        parts = tl.where(inside & (score > 0.0), score, 0.0)
    share = (parts / tl.maximum(tl.sum(parts, 0), 1.17549435e-38)).to(tl.float16).to(tl.float32)
    wanted = inside & (rank < M)
    tl.store(id_words + token * M + rank, tag | mine.to(tl.uint32, bitcast=True).to(tl.int64), mask=wanted)
    tl.store(share_words + token * M + rank, tag | share.to(tl.uint32, bitcast=True).to(tl.int64), mask=wanted)


def publish_ranking(scores: Any, ids: Any, turn: Any, words: tuple[Any, Any], ranks: int, *, are_logits: bool) -> None:
    """Write what `traces.recorder.routers.rank` returns of `scores` [n, E] (fp32) and `ids` [n, K] into host memory.

    `words` are those of ids and of shares, [n * ranks] each; shares are rounded to fp16, as in a trace.
    """
    tokens, experts = scores.shape
    _rank[(tokens,)](
        scores,
        ids,
        turn,
        *words,
        experts,
        ids.shape[1],
        ranks,
        triton.next_power_of_2(experts),
        32,
        are_logits,
        num_warps=2,
    )
