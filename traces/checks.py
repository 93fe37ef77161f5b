"""What every trace must satisfy. The reader, the writer and the importers share these checks.

Nothing is repaired here. The first fault found raises `InputError` with one sentence that names the
file, the field and the value, and what would be right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError, nearest
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Provenance, Trace

PROVENANCE_KINDS = ("recorded", "imported", "synthetic")

BLOCK_VALUES = 4_000_000
"""Values checked at a time, so that checking a huge trace needs a few tens of megabytes."""

MOST_EXPERTS = 1 + np.iinfo(np.int16).max
"""The most experts of a layer that the widest id type can number."""

_FLOATS = ("float16", "float32")
_IDS = ("int8", "int16")

_ROUNDING = {"float16": 2.0**-10, "float32": 2.0**-22}
"""How far a later rank may exceed the one before, relative: one rounding of the stored type, because the
model may have ranked the experts in a wider type than the one that was stored."""

_SLACK = 0.01
"""How far probabilities and cosines may exceed 1: they come from half-precision arithmetic."""


@dataclass(frozen=True)
class ArraySpec:
    """What the schema says about one array of a trace."""

    axes: str
    """One letter per axis: T tokens, L layers, K top-k, E experts, D lookahead depth, M predictions."""
    dtypes: tuple[str, ...]
    """Element types allowed."""
    required: bool = True


ARRAYS: Mapping[str, ArraySpec] = {
    "experts": ArraySpec("TLK", _IDS),
    "weights": ArraySpec("TLK", _FLOATS, required=False),
    "request": ArraySpec("T", ("int32",)),
    "position": ArraySpec("T", ("int32",)),
    "step": ArraySpec("T", ("int32",)),
    "phase": ArraySpec("T", ("uint8",)),
    "token_ids": ArraySpec("T", ("int32",), required=False),
    "router_logits": ArraySpec("TLE", _FLOATS, required=False),
    "lookahead_experts": ArraySpec("TLDM", _IDS, required=False),
    "lookahead_scores": ArraySpec("TLDM", ("float16",), required=False),
    "expert_output_norm": ArraySpec("TLK", _FLOATS, required=False),
    "residual_cosine": ArraySpec("TL", _FLOATS, required=False),
}
"""Every array a trace can have, by its name in `Trace` and in the file."""


def expert_dtype(experts: int) -> np.dtype[Any]:
    """Return the smallest type that holds the ids of `experts` experts and -1."""
    return np.dtype(np.int8 if experts <= 128 else np.int16)


def present_arrays(trace: Trace) -> dict[str, Array]:
    """Return the arrays that `trace` has, by name, in the schema's order."""
    found = {name: getattr(trace, name) for name in ARRAYS}
    return {name: array for name, array in found.items() if array is not None}


def validate_trace(trace: Trace, name: str) -> None:
    """Check everything the schema promises: metadata, types, shapes and every value.

    `name` begins the sentence of a rejection: the file, or what made the trace. Values are read block by
    block, so memory-mapped arrays need not fit in memory.

    Raises `InputError` at the first fault.
    """
    _check_model(name, trace.model)
    _check_provenance(name, trace.provenance)
    _check_domains(name, trace.domains)
    if not isinstance(trace.ranked, bool):
        raise InputError(f"{name}: ranked is {trace.ranked!r}; it must be true or false")
    arrays = present_arrays(trace)
    _check_shapes(name, trace.model, arrays)
    _check_tokens(name, trace)
    for start, block in _blocks(arrays):
        _check_routing(_Block(name, start, trace.model), block, trace.ranked)
        _check_lookahead(_Block(name, start, trace.model), block)
        _check_importance(_Block(name, start, trace.model), block)


def _check_model(name: str, model: ModelSpec) -> None:
    if not isinstance(model.name, str) or not model.name:
        raise InputError(f"{name}: model.name is {model.name!r}; it must be a text that is not empty")
    for field in ("layers", "experts", "top_k"):
        _check_size(name, f"model.{field}", getattr(model, field), least=1)
    _check_size(name, "model.shared_experts", model.shared_experts, least=0)
    if model.experts > MOST_EXPERTS:
        raise InputError(f"{name}: model.experts is {model.experts}; at most {MOST_EXPERTS} can be numbered")
    if model.top_k > model.experts:
        raise InputError(f"{name}: model.top_k is {model.top_k}; it must be at most model.experts, {model.experts}")
    for field in ("hidden_size", "expert_width", "other_bytes", "kv_bytes_per_token"):
        if getattr(model, field) is not None:
            _check_size(name, f"model.{field}", getattr(model, field), least=0 if "bytes" in field else 1)
    if not isinstance(model.expert_bytes, Mapping):
        raise InputError(f"{name}: model.expert_bytes must map a precision to bytes, e.g. {{'bf16': 12582912}}")
    for precision, size in model.expert_bytes.items():
        if not isinstance(precision, str):
            raise InputError(f"{name}: model.expert_bytes has the key {precision!r}; a precision is a text")
        _check_size(name, f"model.expert_bytes[{precision!r}]", size, least=1)


def _check_size(name: str, field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: {field} is {value!r}; it must be a whole number of at least {least}")


def _check_provenance(name: str, provenance: Provenance) -> None:
    if provenance.kind not in PROVENANCE_KINDS:
        hint = nearest(str(provenance.kind), PROVENANCE_KINDS)
        raise InputError(f"{name}: provenance.kind is {provenance.kind!r}; {hint}")
    for field in ("source", "made_by"):
        if not isinstance(getattr(provenance, field), str):
            raise InputError(f"{name}: provenance.{field} is {getattr(provenance, field)!r}; it must be a text")
    if not isinstance(provenance.details, Mapping):
        raise InputError(f"{name}: provenance.details must map names to JSON values")


def _check_domains(name: str, domains: tuple[str, ...]) -> None:
    for request, domain in enumerate(domains):
        if not isinstance(domain, str):
            raise InputError(f"{name}: domains[{request}] is {domain!r}; a domain is a text, '' where unknown")


def _check_shapes(name: str, model: ModelSpec, arrays: Mapping[str, Array]) -> None:
    for field, spec in ARRAYS.items():
        if field not in arrays and spec.required:
            raise InputError(f"{name}: the array '{field}' is missing; it must be [{', '.join(spec.axes)}]")
    lookahead = [field for field in ("lookahead_experts", "lookahead_scores") if field in arrays]
    if len(lookahead) == 1:
        raise InputError(f"{name}: '{lookahead[0]}' is there alone; lookahead needs both experts and scores")
    sizes = {"T": len(arrays["experts"]), "L": model.layers, "K": model.top_k, "E": model.experts}
    if sizes["T"] == 0:
        raise InputError(f"{name}: the trace has no tokens; it must have at least one")
    if lookahead and arrays["lookahead_experts"].ndim == 4:
        sizes["D"], sizes["M"] = arrays["lookahead_experts"].shape[2:]
    for field, array in arrays.items():
        _check_array(name, field, array, sizes)
    if lookahead:
        _check_lookahead_sizes(name, model, sizes["D"], sizes["M"])
    for field in ("experts", "lookahead_experts"):
        if field in arrays and arrays[field].dtype.itemsize < expert_dtype(model.experts).itemsize:
            wanted = expert_dtype(model.experts)
            raise InputError(f"{name}: {field} is {arrays[field].dtype}; {model.experts} experts need {wanted}")


def _check_array(name: str, field: str, array: Array, sizes: Mapping[str, int]) -> None:
    spec = ARRAYS[field]
    if array.dtype.name not in spec.dtypes:
        raise InputError(f"{name}: {field} is {array.dtype}; it must be {' or '.join(spec.dtypes)}")
    wanted = tuple(sizes.get(axis, -1) for axis in spec.axes)
    if array.shape != wanted:
        said = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in spec.axes)
        raise InputError(f"{name}: {field} has shape {list(array.shape)}; it must be [{said}]")


def _check_lookahead_sizes(name: str, model: ModelSpec, depth: int, ranked: int) -> None:
    if not 1 <= depth < max(model.layers, 2):
        raise InputError(f"{name}: lookahead_experts has depth {depth}; it must be 1 to {max(model.layers - 1, 1)} layers")
    least = min(2 * model.top_k, model.experts)
    if not least <= ranked <= model.experts:
        raise InputError(
            f"{name}: lookahead_experts ranks {ranked} experts; it must be at least {least} (twice top-k)"
            f" and at most {model.experts}"
        )


def _check_tokens(name: str, trace: Trace) -> None:
    """Check the arrays of one value per token: who, where, when."""
    _check_range(name, "request", trace.request, len(trace.domains) - 1, "requests with a domain")
    _check_range(name, "phase", trace.phase, DECODE, f"{PREFILL} (prefill) and {DECODE} (decode)")
    for field, array in (("position", trace.position), ("step", trace.step), ("token_ids", trace.token_ids)):
        if array is not None:
            _check_range(name, field, array, np.iinfo(np.int32).max, "whole numbers from 0")
    fallen = np.flatnonzero(trace.step[1:] < trace.step[:-1])
    if len(fallen):
        token = int(fallen[0]) + 1
        raise InputError(
            f"{name}: step falls from {trace.step[token - 1]} to {trace.step[token]} at token {token};"
            " forward passes must be in order"
        )
    _check_requests(name, trace)


def _check_range(name: str, field: str, values: Array, most: int, allowed: str) -> None:
    bad = np.flatnonzero((values < 0) | (values > most))
    if len(bad):
        token = int(bad[0])
        raise InputError(f"{name}: {field}[token {token}] is {values[token]}; allowed are {allowed}, 0 to {most}")


def _check_requests(name: str, trace: Trace) -> None:
    """Check that each request's tokens follow one another, prefill first."""
    order = np.argsort(trace.request, kind="stable")
    request, position, phase = trace.request[order], trace.position[order], trace.phase[order]
    same = request[1:] == request[:-1]
    jump = np.flatnonzero(same & (np.diff(position.astype(np.int64)) != 1))
    if len(jump):
        at = int(jump[0])
        raise InputError(
            f"{name}: position of request {request[at]} goes from {position[at]} to {position[at + 1]}"
            f" at token {order[at + 1]}; inside a request it must rise by one"
        )
    back = np.flatnonzero(same & (phase[1:] < phase[:-1]))
    if len(back):
        at = int(back[0])
        raise InputError(
            f"{name}: phase of request {request[at]} goes from decode back to prefill at token"
            f" {order[at + 1]}; a request's prefill must come before its decode"
        )


def _blocks(arrays: Mapping[str, Array]) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (first token, the arrays' rows from there), few enough rows to hold in memory."""
    tokens = len(arrays["experts"])
    widest = max(array[0].size for array in arrays.values())
    rows = max(1, BLOCK_VALUES // widest)
    for start in range(0, tokens, rows):
        yield start, {field: array[start : start + rows] for field, array in arrays.items()}


@dataclass(frozen=True)
class _Block:
    """Where the rows under check come from; turns a mask of bad values into a rejection."""

    name: str
    start: int
    """Token of the block's first row."""
    model: ModelSpec

    def reject(self, field: str, values: Array, bad: npt.NDArray[np.bool_], right: str) -> None:
        """Raise for the first True of `bad`, [n, L, ...] like `values`; do nothing if there is none."""
        if not bad.any():
            return
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        names = ("token", "layer", *(["depth", "rank"] if bad.ndim == 4 else ["rank"]))
        # zip stops at the array's own axes: residual_cosine has no rank.
        place = ", ".join(
            f"{axis} {int(index) + (self.start if axis == 'token' else 1 if axis == 'depth' else 0)}"
            for axis, index in zip(names, at, strict=False)
        )
        raise InputError(f"{self.name}: {field}[{place}] is {values[at]}; {right}")


def _check_routing(block: _Block, rows: Mapping[str, Array], ranked: bool) -> None:
    experts = rows["experts"]
    _check_ids(block, "experts", experts)
    if "weights" in rows:
        weights = rows["weights"]
        _check_not_negative(block, "weights", weights, "a gate weight must be finite and not negative")
        if ranked:
            _check_falling(block, "weights", weights)
        _check_absent(block, "weights", weights, experts)
    if "router_logits" in rows:
        logits = rows["router_logits"]
        block.reject("router_logits", logits, ~np.isfinite(logits), "a logit must be finite")


def _check_lookahead(block: _Block, rows: Mapping[str, Array]) -> None:
    if "lookahead_experts" not in rows:
        return
    ids, scores = rows["lookahead_experts"], rows["lookahead_scores"]
    _check_ids(block, "lookahead_experts", ids)
    layers, depth = ids.shape[1:3]
    beyond = np.add.outer(np.arange(layers), 1 + np.arange(depth)) >= layers
    block.reject(
        "lookahead_experts",
        ids,
        beyond[None, :, :, None] & (ids != -1),
        f"it must be -1 where layer + depth is beyond the last of {layers} layers",
    )
    _check_not_negative(block, "lookahead_scores", scores, "a probability must be between 0 and 1")
    block.reject("lookahead_scores", scores, scores > 1 + _SLACK, "a probability must be between 0 and 1")
    _check_falling(block, "lookahead_scores", scores)
    _check_absent(block, "lookahead_scores", scores, ids)


def _check_importance(block: _Block, rows: Mapping[str, Array]) -> None:
    if "expert_output_norm" in rows:
        norms = rows["expert_output_norm"]
        _check_not_negative(block, "expert_output_norm", norms, "a norm must be finite and not negative")
    if "residual_cosine" in rows:
        cosine = rows["residual_cosine"]
        # Written so that NaN, which compares False, is caught too.
        bad = ~(np.abs(cosine) <= 1 + _SLACK)
        block.reject("residual_cosine", cosine, bad, "a cosine must be between -1 and 1")


def _check_ids(block: _Block, field: str, ids: Array) -> None:
    """Check ranked ids along the last axis: known experts, each once, -1 only after the last."""
    experts = block.model.experts
    lowest = int(ids.min())
    if lowest < -1 or int(ids.max()) >= experts:
        right = f"an expert is 0 to {experts - 1}, or -1 for none"
        block.reject(field, ids, (ids < -1) | (ids >= experts), right)
    if lowest == -1:
        after_none = np.zeros(ids.shape, bool)
        after_none[..., 1:] = (ids[..., :-1] == -1) & (ids[..., 1:] != -1)
        block.reject(field, ids, after_none, "it follows a -1, and -1 must only stand after the last expert")
    ranked = np.sort(ids, axis=-1)
    twice = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] != -1)
    if twice.any():
        block.reject(field, ids, _repeated(ids), "the same expert is already there at a better rank")


def _repeated(ids: Array) -> npt.NDArray[np.bool_]:
    """Return where an id (not -1) equals one before it on the last axis."""
    repeated = np.zeros(ids.shape, bool)
    for rank in range(1, ids.shape[-1]):
        repeated[..., rank] = (ids[..., :rank] == ids[..., rank, None]).any(axis=-1)
    repeated[ids == -1] = False
    return repeated


def _check_not_negative(block: _Block, field: str, values: Array, right: str) -> None:
    # NaN compares False, so one comparison from each side finds every fault without a table of flags.
    if not (values.min() >= 0 and values.max() < np.inf):
        block.reject(field, values, ~((values >= 0) & (values < np.inf)), right)


def _check_falling(block: _Block, field: str, values: Array) -> None:
    """Check that `values` fall, or stay, from rank to rank."""
    risen = np.zeros(values.shape, bool)
    risen[..., 1:] = values[..., 1:] > values[..., :-1]
    if risen.any():
        wide = values.astype(np.float32)
        risen[..., 1:] = wide[..., 1:] > wide[..., :-1] * (1 + _ROUNDING[values.dtype.name]) + 1e-7
        block.reject(field, values, risen, "it exceeds the rank before, and ranks must be in descending order")


def _check_absent(block: _Block, field: str, values: Array, ids: Array) -> None:
    """Check that `values` are 0 where there is no expert."""
    absent = ids == -1
    if absent.any():
        block.reject(field, values, absent & (values != 0), "it must be 0 where there is no expert")
