"""Forward passes of llama.cpp, as its MoE layers' top-k tensors show them: one request, one pass after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from traces.checks import expert_dtype
from traces.errors import InputError
from traces.importers._source import as_ids
from traces.trace import Array, ModelSpec, Provenance, Trace

_SURELY_NO_CHANCE = 16
"""Experts from which it is no accident that every so many ids in a row are all of them."""


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    where: str
    """Lines or rows, for sentences."""
    layers: Mapping[int, Array]
    """[n, K] expert ids by layer number, in the order of the layers."""
    phase: int


def trace_of_passes(path: Path, name: str, experts: int, passes: Sequence[Pass], provenance: Provenance) -> Trace:
    """Return the trace of `passes`: one request; gate weights and the order of a token's experts unknown.

    The model's last layer may list fewer tokens than the others: llama.cpp computes it only for tokens whose output is
    asked for, which is the last of a prompt or none. The other tokens use no expert there.

    Raises `InputError` when the passes disagree about their layers, hold what is no expert, or list experts as a faulty
    recorder does.
    """
    if not passes:
        raise InputError(f"{path}: no pass is there; a recording holds at least one")
    layers = sorted({layer for one in passes for layer in one.layers})
    top_k = next(iter(passes[0].layers.values())).shape[1]
    _refuse_misread(path, passes, experts)
    lengths = [len(next(iter(one.layers.values()))) for one in passes]
    for one, length in zip(passes, lengths, strict=True):
        _check_tokens(path, one, length, layers)
    ids = np.full((sum(lengths), len(layers), top_k), -1, expert_dtype(experts))
    ends = np.cumsum(lengths)
    for one, end in zip(passes, ends, strict=True):
        for layer, chosen in one.layers.items():
            rows = slice(end - len(chosen), end)
            ids[rows, layers.index(layer)] = as_ids(path, f"{one.where}: layer {layer}", chosen, experts)
    tokens = np.arange(len(ids), dtype=np.int32)
    return Trace(
        model=ModelSpec(name, layers=len(layers), experts=experts, top_k=top_k),
        provenance=provenance,
        domains=("",),
        experts=ids,
        request=np.zeros(len(ids), np.int32),
        position=tokens,
        step=np.repeat(np.arange(len(passes), dtype=np.int32), lengths),
        phase=np.repeat(np.array([one.phase for one in passes], np.uint8), lengths),
        ranked=False,
    )


def _check_tokens(path: Path, one: Pass, tokens: int, layers: Sequence[int]) -> None:
    """Check that every layer lists the pass's `tokens` tokens; the last may list one or none."""
    for layer in layers:
        found = len(one.layers.get(layer, ()))
        last = layer == layers[-1] != layers[0]
        if found != tokens and not (last and found < min(tokens, 2)):
            raise InputError(
                f"{path}: {one.where}: layer {layer} lists {found} tokens, the first listed {tokens}; all must agree, only"
                " the model's last layer may list one or none"
            )


def _refuse_misread(path: Path, passes: Sequence[Pass], experts: int) -> None:
    """Refuse a recording that shows the sorted experts of the first tokens instead of the best of each.

    llama.cpp's top-k tensor is a view of all experts in sorted order. A recorder that reads it as if it were dense gets,
    from passes of several tokens, whole permutations of the experts (first versions of PR 28544 did).
    """
    rows = [ids.ravel() for one in passes for ids in one.layers.values() if len(ids) > 1 and ids.size >= experts]
    if experts < _SURELY_NO_CHANCE or not rows:
        return
    if all(len(np.unique(row[:experts])) == experts for row in rows):
        raise InputError(
            f"{path}: in every pass of several tokens the first {experts} ids are all {experts} experts; the recorder read"
            " the top-k view as if it were dense, and a newer version must record again"
        )
