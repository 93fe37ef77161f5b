"""BigMoeOnEdge's route trace: CSV with one row for each routed expert, after a few # lines.

Written by ``--route-trace`` (BigMoeOnEdge PR 21 and docs/telemetry.md). The file begins with ``# route_trace v1``, then ``#
model=PATH arch=NAME n_layer=N n_expert=N n_expert_used=N`` and, for each layer, ``# layer=N expert_bytes=N dense_bytes=N``.
Columns are found by name: ``turn`` of the session, ``phase`` (0 prompt, 1 decode), ``step`` (the token's position in the
context), ``layer``, ``slot`` (the router's rank), ``expert`` and ``weight`` as applied, ``nan`` where it was not to be had.
``residency``, ``expert_bytes`` and whatever else are facts of that run's cache and are not read; where ``dropped`` is 1 the
expert was routed and not computed, which the provenance counts.

A turn is a request, and its positions go on from the turn before. The last layer may lack prompt tokens, whose output
nobody asked for: they use no expert there. With a single ``nan`` no gate weight is taken, and the provenance counts
them. Where weights do not fall with the slot (routers that choose by another score), or are not known, the order counts
as unknown. Bytes of one expert differ between layers and are kept in the provenance, with the layers' numbers.

Cannot be known: which prompt tokens shared a pass (a turn's prompt is one step); what is not in a ``nan`` weight.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import MOST_EXPERTS
from traces.errors import InputError
from traces.importers._source import (
    LAST_POSITION,
    MAX_BYTES,
    MOST_LAYERS,
    as_ids,
    digits,
    imported,
    one_by_one,
    read_lines,
    whole,
)
from traces.trace import DECODE, Array, ModelSpec, Trace

_COLUMNS: Mapping[str, int] = {
    "turn": LAST_POSITION,
    "phase": DECODE,
    "step": LAST_POSITION,
    "layer": MOST_LAYERS - 1,
    "slot": MOST_EXPERTS - 1,
    "expert": MOST_EXPERTS - 1,
}
"""Whole-numbered columns that are read, and the most that each may hold."""

_MODEL = re.compile(
    r"# model=(?P<model>.*) arch=\S* n_layer=\d+ n_expert=(?P<experts>\d{1,9}) n_expert_used=(?P<top_k>\d{1,9})"
)
_LAYER = re.compile(r"# layer=(\d{1,9}) expert_bytes=(\d{1,18})\b")

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


@dataclass
class _Rows:
    """The file's rows by column, and what its # lines say."""

    name: str = ""
    experts: int = 0
    top_k: int = 0
    expert_bytes: dict[int, int] = field(default_factory=dict)
    columns: dict[str, array[Any]] = field(default_factory=lambda: {name: array("i") for name in _COLUMNS})
    weight: array[Any] = field(default_factory=lambda: array("d"))
    dropped: int = 0


def read(path: Path, *, model_name: str | None = None, max_bytes: int = MAX_BYTES) -> Trace:
    """Return the recording at `path`; the module's docstring describes the format.

    `model_name` replaces the model's name, which is otherwise the last part of the path that the file names. `max_bytes`
    limits the file.

    Raises `InputError` when the file is damaged, incomplete or inconsistent.
    """
    rows = _read_rows(path, read_lines(path, max_bytes))
    column = {name: np.array(values, np.int64) for name, values in rows.columns.items()}
    tokens, token = np.unique(np.stack([column["turn"], column["step"]]), axis=1, return_inverse=True)
    token = token.ravel()
    layers, layer = np.unique(column["layer"], return_inverse=True)
    phase = np.zeros(tokens.shape[1], np.uint8)
    phase[token] = column["phase"]
    _check_cells(path, column, tokens, token, layers, layer, phase, rows.top_k)
    cells = (token, layer, column["slot"])
    ids = np.full((tokens.shape[1], len(layers), rows.top_k), -1, np.int64)
    ids[cells] = column["expert"]
    weights = np.zeros(ids.shape, np.float32)
    weights[cells] = np.array(rows.weight)
    absent = int(np.isnan(weights).sum())
    request = np.unique(tokens[0], return_inverse=True)[1].astype(np.int32)
    return Trace(
        model=ModelSpec(model_name or rows.name, layers=len(layers), experts=rows.experts, top_k=rows.top_k),
        provenance=imported(
            path,
            __name__,
            ("gate weights",) * (absent > 0) + ("which prompt tokens shared a pass",),
            {"model_name": model_name},
            weights_that_are_nan=absent,
            routed_but_dropped=rows.dropped,
            layers=layers.tolist(),
            expert_bytes_of_layers=[rows.expert_bytes.get(number) for number in layers.tolist()],
        ),
        domains=("",) * (int(request.max()) + 1),
        experts=as_ids(path, "expert", ids, rows.experts),
        weights=None if absent else weights,
        request=request,
        position=tokens[1].astype(np.int32),
        step=one_by_one(request, phase),
        phase=phase,
        ranked=not absent and bool((weights[..., 1:] <= weights[..., :-1]).all()),
    )


def _read_rows(path: Path, lines: Iterator[tuple[int, str]]) -> _Rows:
    _, first = next(lines, (0, ""))
    if first != "# route_trace v1":
        raise InputError(f"{path}: line 1 is {first!r:.80}; it must be '# route_trace v1'")
    rows = _Rows()
    place: dict[str, int] = {}
    for number, line in lines:
        if line.startswith("#"):
            _read_remark(path, number, line, rows)
        elif not place:
            place = _places(path, number, line)
        else:
            _read_row(path, number, line.split(","), place, rows)
    if not rows.weight:
        raise InputError(f"{path}: no row follows the column names; a recording holds at least one token")
    if not rows.experts:
        raise InputError(f"{path}: the line '# model=... n_expert=N n_expert_used=N' is missing; it says the model's shape")
    return rows


def _read_remark(path: Path, number: int, line: str, rows: _Rows) -> None:
    if found := _MODEL.match(line):
        rows.name = re.split(r"[/\\]", found[1])[-1] or path.stem
        rows.experts = whole(path, f"line {number}: n_expert", int(found[2]), 1, MOST_EXPERTS)
        rows.top_k = whole(path, f"line {number}: n_expert_used", int(found[3]), 1, rows.experts)
    elif found := _LAYER.match(line):
        rows.expert_bytes[int(found[1])] = int(found[2])


def _places(path: Path, number: int, line: str) -> dict[str, int]:
    """Return where in a row each column stands."""
    names = line.split(",")
    for name in (*_COLUMNS, "weight"):
        if names.count(name) != 1:
            raise InputError(f"{path}: line {number} names the columns {line!r:.80}; '{name}' must be there once")
    return {name: place for place, name in enumerate(names)}


def _read_row(path: Path, number: int, values: list[str], place: Mapping[str, int], rows: _Rows) -> None:
    if len(values) != len(place):
        raise InputError(f"{path}: line {number} has {len(values)} fields; the columns are {len(place)}")
    for name, most in _COLUMNS.items():
        rows.columns[name].append(digits(path, number, name, values[place[name]], most))
    try:
        weight = float(values[place["weight"]])
    except ValueError:
        weight = -1.0
    if not (math.isnan(weight) or 0 <= weight <= _LARGEST_WEIGHT):
        said = values[place["weight"]]
        raise InputError(f"{path}: line {number}: weight is {said!r:.80}; it must be a number from 0, or nan")
    rows.weight.append(weight)
    rows.dropped += "dropped" in place and values[place["dropped"]] == "1"


def _check_cells(
    path: Path,
    column: Mapping[str, Array],
    tokens: Array,
    token: Array,
    layers: Array,
    layer: Array,
    phase: Array,
    top_k: int,
) -> None:
    """Check that every token has, in every layer, each slot once; the last layer may lack prompt tokens."""

    def of(number: int) -> str:
        return f"turn {tokens[0, number]}, step {tokens[1, number]}"

    if (mixed := phase[token] != column["phase"]).any():
        raise InputError(f"{path}: {of(token[mixed][0])} is both prompt and decode; a token is one of them")
    if (column["slot"] >= top_k).any():
        raise InputError(f"{path}: a row has slot {column['slot'].max()}; with n_expert_used {top_k} it must be below")
    for place, number in enumerate(layers.tolist()):
        here = layer == place
        times = np.bincount(token[here], minlength=len(phase))
        wrong = times != top_k
        if place == len(layers) - 1 > 0:
            wrong &= (phase == DECODE) | (times > 0)
        if not wrong.any():
            slots, count = np.unique(token[here] * top_k + column["slot"][here], return_counts=True)
            wrong[slots[count > 1] // top_k] = True
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(
                f"{path}: {of(at)}, layer {number} has {times[at]} rows; it must have slots 0 to {top_k - 1}, each once"
            )
