"""Cells for `real.replay`, made from Hydra configurations: ``python -m real.cells --out FOLDER``.

The folder then holds ``cells.json`` and the routing of every shape, and is all that the machine with the GPU needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from policies.system import AXES
from real.commands import ended
from real.decoder import ModelShape
from real.replay import Cell, make_folder
from sim.config import compose_config
from sim.costs import decode_layer_ns, transfer_ns
from sim.experiment import costs_of, slots_of, workload_of
from sim.hardware import model_spec
from traces import Provenance, Trace, bundled, load_trace, save_trace, take_tokens
from traces.atomic import write_atomically
from traces.errors import InputError
from traces.trace import ModelSpec

CELLS = "cells.json"

CHUNK_BYTES = 4 << 20
"""A prefetch crosses in copies of so many bytes, two of them ahead: what a demand may stand behind."""

GRID = {"olmoe_1b_7b": (0.25, 0.5), "qwen1_5_moe_a2_7b": (0.25,), "deepseek_v2_lite": (0.5,)}
"""Budgets by model."""

GRID_SYSTEMS = ("lfu", "lru", "lrfu", "next_gate", "next_gate_lrfu", "fate")
"""Of those that decide in the same way, which a ranking cannot tell apart, only one: `previous_token` prefetches what an LRU
has anyway."""


def fit_routing(trace: Trace, spec: ModelSpec) -> Trace:
    """Return the routing of `trace` in the shape of another model: fewer experts per token, fewer experts, other layers.

    Of every token's ranked experts the first ``spec.top_k`` that the model has are kept. Layers that the recording lacks
    route as its first ones did for the next request at the same position: as local and as skewed as the recording, but
    not the same as the layer that they are taken from. A trace with such layers calls itself synthetic. Raises InputError
    where the recording has fewer experts per token than the model.
    """
    recorded = trace.model
    if recorded.top_k < spec.top_k:
        raise InputError(f"model '{spec.name}' routes to {spec.top_k} experts, but the recording only to {recorded.top_k}")
    assert trace.weights is not None
    experts, weights = _first(trace.experts, trace.weights, spec.experts, spec.top_k)
    ranked, scores = trace.lookahead_experts, trace.lookahead_scores
    if ranked is not None and scores is not None:
        ranked, scores = _first(ranked, scores, spec.experts, 2 * spec.top_k)
    other = _rows_of_next_request(trace)

    def layers(array: Any) -> Any:
        parts = [array[:, : spec.layers]]
        while (missing := spec.layers - sum(part.shape[1] for part in parts)) > 0:
            array = array[other]
            parts.append(array[:, :missing])
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    if ranked is not None and scores is not None:
        ranked, scores = layers(ranked), layers(scores)
        for depth in range(ranked.shape[2]):  # what was predicted for a layer that the model does not have
            ranked[:, max(spec.layers - 1 - depth, 0) :, depth] = -1
            scores[:, max(spec.layers - 1 - depth, 0) :, depth] = 0
    made_up = spec.layers > recorded.layers
    return Trace(
        model=spec,
        provenance=Provenance(
            "synthetic" if made_up else trace.provenance.kind,
            f"{trace.provenance.source}, in the shape of {spec.name} ({spec.layers} x {spec.experts}, top-{spec.top_k})",
            "foregate real.cells",
        ),
        domains=trace.domains,
        experts=layers(experts),
        weights=layers(weights),
        request=trace.request,
        position=trace.position,
        step=trace.step,
        phase=trace.phase,
        lookahead_experts=ranked,
        lookahead_scores=scores,
    )


def make_cell(name: str, overrides: Iterable[str], folder: Path, *, slots: int | None = None, **changes: Any) -> Cell:
    """Return the cell of the configuration ``simulate`` with `overrides`, which name a trace in `folder`.

    `slots` stands in place of the budget; `changes` are further fields of `Cell`. Raises InputError.
    """
    config = compose_config("simulate", list(overrides))
    workload = workload_of(config)
    costs, spec = costs_of(config, workload)
    fields: dict[str, Any] = {
        "name": name,
        "trace": str(Path(config["trace"]["path"]).relative_to(folder)),
        "workload": dict(config["workload"]),
        "model": decoder_shape(spec)._asdict(),
        "system": {
            "name": config["system"]["name"],
            **{flag: config[flag] for flag in ("drop_unused_prefetches", "reupload_after_use")},
            **{axis: dict(config[axis]) for axis in AXES},
        },
        "slots": slots_of(config["budget"], workload.trace.model, costs) if slots is None else slots,
        "warmup": 32,
        "steps": 56,
        "marked": 16,
        "passes": 4,
        "seed": config["seed"],
        "layer_ns": decode_layer_ns(costs, spec.top_k),
        "transfer_ns": transfer_ns(costs),
        "chunk_bytes": CHUNK_BYTES,
        "window_bytes": 2 * CHUNK_BYTES,
    }
    return Cell(**{**fields, **changes})


def decoder_shape(spec: ModelSpec) -> ModelShape:
    """Return a decoder of the model's sizes.

    Attention is plain with heads of 128; what the model's other bytes hold beyond it makes the vocabulary, so that the
    decoder has as many bytes as the model. Raises InputError where a size is unknown.
    """
    if spec.hidden_size is None or spec.expert_width is None or spec.other_bytes is None:
        raise InputError(
            f"model '{spec.name}' does not say its sizes, which a decoder needs: choose one that does with model=NAME"
        )
    hidden, shared = spec.hidden_size, spec.shared_experts * spec.expert_width
    per_layer = 4 * hidden**2 + spec.experts * hidden + 3 * shared * hidden
    vocabulary = max((spec.other_bytes // 2 - spec.layers * per_layer) // (2 * hidden), 1024)
    return ModelShape(
        spec.layers, spec.experts, spec.top_k, hidden, spec.expert_width, shared, max(hidden // 128, 1), vocabulary
    )


def make_grid(folder: Path, tokens: int = 480) -> list[Cell]:
    """Write the routing of every model of the grid into `folder` and return its cells: by model, anchors first."""
    recording = take_tokens(load_trace(bundled()["reference_16x64_top8"]), tokens)
    cells: list[Cell] = []
    for model, budgets in GRID.items():
        spec = model_spec(compose_config("simulate", [f"model={model}"])["model"])
        path = folder / f"{model}.safetensors"
        save_trace(fit_routing(recording, spec), path)
        common = [f"trace={path}", f"model={model}", "workload.phases=decode"]
        all_slots = spec.layers * spec.experts
        anchors = [
            make_cell(f"{model} all resident", [*common, "system=lru"], folder, slots=all_slots, preload=True),
            make_cell(f"{model} all missing", [*common, "system=load_on_demand"], folder),
            make_cell(f"{model} perfect prefetch", [*common, "system=clairvoyant", "budget=0.5"], folder),
        ]
        grid = [
            make_cell(f"{model} {system} {budget}", [*common, f"system={system}", f"budget={budget}"], folder)
            for budget in budgets
            for system in GRID_SYSTEMS
        ]
        cells += anchors + grid
    return cells


def write_cells(cells: Iterable[Cell], path: Path) -> None:
    """Write cells as JSON, at once."""
    write_atomically(path, json.dumps([asdict(cell) for cell in cells], indent=1).encode())


def _first(ids: Any, values: Any, experts: int, count: int) -> tuple[Any, Any]:
    """Return the first `count` of the ranked `ids` [..., M] below `experts`, and their values; else -1 and 0."""
    known = (ids >= 0) & (ids < experts)
    order = np.argsort(~known, axis=-1, kind="stable")[..., :count]
    there = np.take_along_axis(known, order, -1)
    return (
        np.where(there, np.take_along_axis(ids, order, -1), -1).astype(ids.dtype),
        np.where(there, np.take_along_axis(values, order, -1), 0).astype(values.dtype),
    )


def _rows_of_next_request(trace: Trace) -> Any:
    """Return for every row that of the next request (the first follows the last) at the same position, modulo its length."""
    rows = {request: np.flatnonzero(trace.request == request) for request in np.unique(trace.request).tolist()}
    names = sorted(rows)
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    return np.array(
        [
            rows[following[request]][position % len(rows[following[request]])]
            for request, position in zip(trace.request.tolist(), trace.position.tolist(), strict=True)
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m real.cells", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args(arguments).out.resolve()
    return ended(lambda: _run(folder), "nothing was written")


def _run(folder: Path) -> int:
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        make_folder(folder)
        cells = _write_grid(folder)
    except KeyboardInterrupt:
        for each in new:
            with suppress(OSError):  # one that was not made yet
                each.rmdir()
        raise
    print(f"{len(cells)} cells in {folder / CELLS}")
    return 0


def _write_grid(folder: Path) -> list[Cell]:
    """Make the grid under a temporary name and move it into `folder` when it is whole, the cells last."""
    with tempfile.TemporaryDirectory(prefix=".cells", dir=folder) as name:
        made = Path(name)
        cells = make_grid(made)
        for path in sorted(made.iterdir()):
            os.replace(path, folder / path.name)
    write_cells(cells, folder / CELLS)
    return cells


if __name__ == "__main__":
    sys.exit(main())
