"""Trace files: one recording, one `.safetensors` file.

The arrays of `traces.trace.Trace` lie in the file under their own names. The file's metadata holds the
schema version, and as JSON the model, the provenance and the domains, and a sha256 over all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from traces.checks import ARRAYS, present_arrays, validate_trace
from traces.container import array_bytes, header_bytes, in_file_order, read_container, write_container
from traces.errors import InputError, nearest
from traces.trace import Array, ModelSpec, Provenance, Trace

SCHEMA = "1"
"""Version of the file's layout. A file of another version is refused."""

_METADATA = ("foregate_trace", "model", "provenance", "domains", "hash")
_UNRANKED = {"ranked": "false"}
"""Metadata of a trace whose experts are in no promised order; absent from all others, so that these keep their bytes."""

_Record = TypeVar("_Record", ModelSpec, Provenance)


def load_trace(path: str | PathLike[str], *, verify: bool = False) -> Trace:
    """Read a trace. Its arrays are read-only views of the file, which must stay where it is.

    Every value is checked against the schema. `verify` also recomputes the content's sha256, which finds
    damage that leaves a plausible trace.

    Raises `InputError` when the file is no trace, or is inconsistent in any way; nothing is repaired.
    """
    path = Path(path)
    metadata, arrays = read_container(path)
    _check_metadata(path, metadata)
    _check_names(path, arrays)
    trace = Trace(
        model=_record(path, "model", metadata, ModelSpec),
        provenance=_record(path, "provenance", metadata, Provenance),
        domains=_domains(path, metadata),
        ranked="ranked" not in metadata,
        hash=metadata["hash"],
        **arrays,
    )
    validate_trace(trace, str(path))
    if verify and (found := content_hash(trace)) != trace.hash:
        raise InputError(f"{path}: hash is {trace.hash}, but the content's is {found}; the file was changed")
    return trace


def save_trace(trace: Trace, path: str | PathLike[str]) -> str:
    """Write `trace` to `path` and return its sha256. The same trace always gives the same bytes.

    The file appears whole or not at all: it is written under another name in the same folder and renamed.
    `trace.hash` is ignored.

    Raises `InputError` when the trace is inconsistent, when `path` does not end in ``.safetensors`` or when
    its folder does not exist, and `OSError` when the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a trace file's name must end in .safetensors, not in '{path.suffix}'")
    validate_trace(trace, str(path))
    digest = content_hash(trace)
    write_container(path, {**_metadata_of(trace), "hash": digest}, present_arrays(trace))
    return digest


def content_hash(trace: Trace) -> str:
    """Return the sha256, in hexadecimal, of the trace's metadata and arrays.

    Raises `InputError` when the provenance holds something that JSON cannot.
    """
    arrays = present_arrays(trace)
    digest = hashlib.sha256(header_bytes(_metadata_of(trace), arrays))
    for _, array in in_file_order(arrays):
        for piece in array_bytes(array):
            digest.update(piece.data)
    return digest.hexdigest()


def _metadata_of(trace: Trace) -> dict[str, str]:
    """Return the metadata of the file, without the hash that is computed from it."""
    return {
        "foregate_trace": SCHEMA,
        "model": _to_json("model", _fields(trace.model)),
        "provenance": _to_json("provenance", _fields(trace.provenance)),
        "domains": _to_json("domains", list(trace.domains)),
        **({} if trace.ranked else _UNRANKED),
    }


def _fields(record: ModelSpec | Provenance) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _to_json(field: str, value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field}: {error}; metadata must hold JSON values only") from None


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if "foregate_trace" not in metadata:
        raise InputError(
            f"{path}: this safetensors file is no trace: its metadata lacks 'foregate_trace';"
            " `foregate trace import` converts recordings of other programs"
        )
    if metadata["foregate_trace"] != SCHEMA:
        raise InputError(
            f"{path}: the schema version is '{metadata['foregate_trace']}'; this program reads version '{SCHEMA}'"
        )
    for name in metadata:
        if name not in (*_METADATA, *_UNRANKED):
            raise InputError(f"{path}: unknown metadata '{name}'; {nearest(name, (*_METADATA, *_UNRANKED))}")
    if metadata.get("ranked", "false") != "false":
        raise InputError(f"{path}: the metadata 'ranked' is {metadata['ranked']!r:.80}; it must be 'false' or absent")
    for name in _METADATA:
        if name not in metadata:
            raise InputError(f"{path}: the metadata '{name}' is missing; a trace has {', '.join(_METADATA)}")
    if not re.fullmatch("[0-9a-f]{64}", metadata["hash"]):
        raise InputError(f"{path}: the hash is {metadata['hash']!r:.80}; it must be 64 hexadecimal digits")


def _check_names(path: Path, arrays: Mapping[str, Array]) -> None:
    for name in arrays:
        if name not in ARRAYS:
            raise InputError(f"{path}: unknown array '{name}'; {nearest(name, ARRAYS)}")
    for name, spec in ARRAYS.items():
        if spec.required and name not in arrays:
            raise InputError(f"{path}: the array '{name}' is missing; it must be [{', '.join(spec.axes)}]")


def _from_json(path: Path, name: str, metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata[name], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the metadata '{name}' is not valid JSON ({error})") from None


def _no_constant(name: str) -> None:
    # Python reads NaN and Infinity, which are no JSON and which `save_trace` never writes.
    raise ValueError(f"{name} is no JSON value")


def _record(path: Path, name: str, metadata: Mapping[str, str], kind: type[_Record]) -> _Record:
    """Return the metadata `name` as a `kind`, whose fields it must have and no others."""
    found = _from_json(path, name, metadata)
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(found, dict):
        raise InputError(f"{path}: the metadata '{name}' must be a JSON object with {', '.join(sorted(known))}")
    for field in found:
        if field not in known:
            raise InputError(f"{path}: unknown field '{name}.{field}'; {nearest(field, known)}")
    try:
        return kind(**found)
    except TypeError as error:
        raise InputError(f"{path}: the metadata '{name}' is incomplete: {error}") from None


def _domains(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    found = _from_json(path, "domains", metadata)
    if not isinstance(found, list):
        raise InputError(f"{path}: the metadata 'domains' must be a list with the domain of each request")
    return tuple(found)


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
