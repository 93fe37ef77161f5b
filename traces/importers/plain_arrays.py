"""Plain arrays in an `.npz` archive, as NumPy saves them.

``experts`` [T, L, K] in descending weight, ``weights`` [T, L, K], ``offsets`` [N + 1] (request i is rows
offsets[i] to offsets[i + 1]) and ``meta``, the bytes of a JSON object: model, num_layers, num_experts,
top_k, phase, and optionally num_shared, source, commit, license, task and sequences (one object per
request: category, dataset, pos0, tokens).

Read too where present: ``router_logits`` [T, L, E]; ``cross_ids`` and ``cross_scores`` [T, L, D, M] (255 and
-1 where nothing was predicted); ``expert_out_norm`` [T, L, K]; ``position``, ``phase`` and ``token_ids`` [T];
``seq_domain`` [N] and ``domain_names``. With ``phase`` and ``router_logits``, ``meta`` may be absent: such a
recording says what was recorded without naming the model.

Each token of decode is a step of its own, each request's prefill one step: the format does not say which
tokens shared a forward pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import expert_dtype
from traces.errors import InputError
from traces.files import file_sha256
from traces.importers._npz import NpzArchive
from traces.importers._source import LAST_POSITION, one_by_one, whole
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Provenance, Trace

_PHASES = {"prefill": PREFILL, "decode": DECODE}
_NO_PREDICTION = 255


def read(path: Path, *, model_name: str | None = None, max_bytes: int = 2**31) -> Trace:
    """Return the recording at `path`; the module's docstring describes the format.

    `model_name` replaces the name that the file gives, or its file name where it gives none. `max_bytes`
    limits what the archive may unpack to. What the file does not say stays unknown, and the provenance
    lists it.

    Raises `InputError` when the archive is damaged, hostile, incomplete or inconsistent.
    """
    with NpzArchive(path, whole(path, "options.max_bytes", max_bytes, least=1)) as archive:
        about = _read_about(archive)
        offsets = _read_offsets(archive)
        model = _model(archive, about, model_name)
        lengths = np.diff(offsets)
        request = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        phase = _read_phase(archive, about, len(request))
        optional = {**_read_optional(archive), **_read_lookahead(archive, model)}
        return Trace(
            model=model,
            provenance=_provenance(path, about, optional),
            domains=_domains(archive, about, len(lengths)),
            experts=_read_ids(archive, "experts", 3, model.experts),
            weights=_read_floats(archive, "weights", 3),
            request=request,
            position=_read_position(archive, about, offsets),
            step=one_by_one(request, phase),
            phase=phase,
            **optional,
        )


@dataclass(frozen=True)
class _About:
    """The file's `meta`, with errors that name the file and the field."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    present: bool = True

    def whole(self, name: str) -> int:
        """Return a whole number of at least 0."""
        return whole(self.path, f"meta.{name}", self.values.get(name))

    def sequences(self, count: int) -> list[dict[str, Any]]:
        """Return one object per request; empty ones where `meta` has none."""
        found = self.values.get("sequences", [{}] * count)
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise InputError(f"{self.path}: meta.sequences must be a list of objects, one per request")
        if len(found) != count:
            raise InputError(f"{self.path}: meta.sequences has {len(found)} entries; offsets give {count}")
        return found


def _read_about(archive: NpzArchive) -> _About:
    if "meta" not in archive:
        if "phase" in archive and "router_logits" in archive:
            return _About(archive.path, present=False)
        raise InputError(
            f"{archive.path}: the array 'meta' is missing; without it the number of experts and the phase"
            " must follow from 'router_logits' and 'phase'"
        )
    text = archive.read("meta", "u", 1)
    try:
        values = json.loads(text.tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{archive.path}: 'meta' is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{archive.path}: 'meta' must be a JSON object")
    return _About(archive.path, values)


def _read_offsets(archive: NpzArchive) -> Array:
    """Return [N + 1] int64, checked against the number of tokens."""
    offsets = archive.read("offsets", "iu", 1).astype(np.int64)
    tokens = archive.shape("experts")[0] if archive.shape("experts") else 0
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
        raise InputError(f"{archive.path}: 'offsets' must rise from 0 to the {tokens} tokens of 'experts'")
    return offsets


def _model(archive: NpzArchive, about: _About, name: str | None) -> ModelSpec:
    """Return what the file says about the model, and nothing more."""
    if not about.present:
        _, layers, top_k = _three_axes(archive, "experts")
        experts = _three_axes(archive, "router_logits")[2]
        return ModelSpec(name or archive.path.stem, layers, experts, top_k)
    said = about.values.get("model")
    if not isinstance(said, str):
        raise InputError(f"{archive.path}: meta.model is {said!r}; it must be the model's name")
    shared = about.whole("num_shared") if "num_shared" in about.values else 0
    sizes = (about.whole("num_layers"), about.whole("num_experts"), about.whole("top_k"))
    return ModelSpec(name or said, *sizes, shared_experts=shared)


def _three_axes(archive: NpzArchive, name: str) -> tuple[int, int, int]:
    shape = archive.shape(name)
    if len(shape) != 3:
        raise InputError(f"{archive.path}: '{name}' has shape {list(shape)}; it must have 3 axes")
    return shape[0], shape[1], shape[2]


def _read_phase(archive: NpzArchive, about: _About, tokens: int) -> Array:
    if "phase" in archive:
        return _per_token(archive, "phase", np.uint8)
    phase = about.values.get("phase")
    if phase not in _PHASES:
        raise InputError(f"{archive.path}: meta.phase is {phase!r}; it must be 'prefill' or 'decode'")
    return np.full(tokens, _PHASES[phase], np.uint8)


def _read_position(archive: NpzArchive, about: _About, offsets: Array) -> Array:
    if "position" in archive:
        return _per_token(archive, "position", np.int32)
    lengths = np.diff(offsets)
    first = []
    for index, one in enumerate(about.sequences(len(lengths))):
        if "tokens" in one and one["tokens"] != lengths[index]:
            raise InputError(
                f"{archive.path}: meta.sequences[{index}].tokens is {one['tokens']!r}; offsets give {lengths[index]}"
            )
        at = whole(archive.path, f"meta.sequences[{index}].pos0", one.get("pos0", 0))
        if at + int(lengths[index]) > LAST_POSITION:
            raise InputError(f"{archive.path}: meta.sequences[{index}].pos0 is {at}, beyond {LAST_POSITION}")
        first.append(at)
    shift = np.repeat(np.array(first, np.int64) - offsets[:-1], lengths)
    position: Array = (np.arange(len(shift)) + shift).astype(np.int32)
    return position


def _per_token(archive: NpzArchive, name: str, dtype: type[np.integer[Any]]) -> Array:
    """Return [T] whole numbers as `dtype`, which must hold them: a conversion would wrap around silently."""
    found = archive.read(name, "iu", 1)
    limits = np.iinfo(dtype)
    if found.size and (found.min() < limits.min or found.max() > limits.max):
        raise InputError(f"{archive.path}: '{name}' must be within {limits.min} and {limits.max}")
    return found.astype(dtype)


def _domains(archive: NpzArchive, about: _About, count: int) -> tuple[str, ...]:
    """Return each request's domain: as recorded, or dataset and category, or the task, as `meta` has it."""
    if "seq_domain" in archive:
        names = archive.read("domain_names", "U", 1)
        chosen = archive.read("seq_domain", "iu", 1)
        if len(chosen) != count or chosen.min() < 0 or chosen.max() >= len(names):
            raise InputError(f"{archive.path}: 'seq_domain' must give each of {count} requests one of {len(names)} domains")
        try:
            return tuple(str(names[index]) for index in chosen)
        except ValueError as error:
            raise InputError(f"{archive.path}: 'domain_names' must be texts ({error})") from None
    task = about.values.get("task", "")
    # A category alone may be a bare number, which says nothing without its dataset.
    named = [[one[key] for key in ("dataset", "category") if one.get(key)] for one in about.sequences(count)]
    return tuple("/".join(map(str, names)) if names else str(task) for names in named)


def _read_ids(archive: NpzArchive, name: str, axes: int, experts: int, missing: int | None = None) -> Array:
    """Return ids as the schema stores them; `missing` marks what was not predicted."""
    found = archive.read(name, "iu", axes)
    absent = np.zeros(found.shape, bool) if missing is None else found == missing
    # Checked before the conversion, where 255 would quietly become -1.
    wrong = ~absent & ((found < 0) | (found >= experts))
    if wrong.any():
        raise InputError(f"{archive.path}: '{name}' holds {found[wrong][0]}; an expert is 0 to {experts - 1}")
    ids = found.astype(expert_dtype(experts))
    ids[absent] = -1
    return ids


def _read_floats(archive: NpzArchive, name: str, axes: int) -> Array:
    found = archive.read(name, "f", axes)
    if found.dtype not in (np.float16, np.float32):
        raise InputError(f"{archive.path}: '{name}' is {found.dtype}; it must be float16 or float32")
    return found


def _read_optional(archive: NpzArchive) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "router_logits" in archive:
        found["router_logits"] = _read_floats(archive, "router_logits", 3)
    if "expert_out_norm" in archive:
        found["expert_output_norm"] = _read_floats(archive, "expert_out_norm", 3)
    if "token_ids" in archive:
        found["token_ids"] = _per_token(archive, "token_ids", np.int32)
    return found


def _read_lookahead(archive: NpzArchive, model: ModelSpec) -> dict[str, Any]:
    if "cross_ids" not in archive:
        return {}
    # With more than 255 experts, 255 is an expert: such a file would mean something else by it.
    if model.experts > _NO_PREDICTION:
        raise InputError(f"{archive.path}: 'cross_ids' means no prediction by 255, and cannot with {model.experts} experts")
    ids = _read_ids(archive, "cross_ids", 4, model.experts, missing=_NO_PREDICTION)
    scores = _read_floats(archive, "cross_scores", 4).astype(np.float16)
    if scores.shape != ids.shape:
        raise InputError(
            f"{archive.path}: 'cross_scores' has shape {list(scores.shape)};"
            f" 'cross_ids' has {list(ids.shape)}, and both must agree"
        )
    scores[ids == -1] = 0
    return {"lookahead_experts": ids, "lookahead_scores": scores}


def _provenance(path: Path, about: _About, optional: dict[str, Any]) -> Provenance:
    kept = ("commit", "license", "task", "phase")
    unknown = ["bytes of experts and of everything else", "KV bytes per token", "which tokens shared a step"]
    if not about.present:
        unknown.insert(0, "name of the model")
    if "router_logits" not in optional:
        unknown.append("router logits")
    if "lookahead_experts" not in optional:
        unknown.append("lookahead observations")
    details = {name: about.values[name] for name in kept if name in about.values}
    details |= {"file": path.name, "file_sha256": file_sha256(path), "unknown": unknown}
    kind = "imported" if about.present else "recorded"
    source = str(about.values.get("source", path.name))
    return Provenance(kind, source, "foregate traces.importers.plain_arrays 1", details)
