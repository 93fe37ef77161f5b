"""Safetensors files, read without copying and written in one stroke.

The reader maps the file into memory and repeats the format's own safety checks, because it trusts
nothing that the header claims. The writer is our own because the published one orders the metadata
differently from run to run, and the same trace must give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from traces.errors import InputError
from traces.trace import Array

HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit."""

AXES_LIMIT = 8
"""No array of ours has more than 4."""

DATA_ALIGNMENT = 64
"""Bytes; the arrays start at a multiple of this."""

_TYPES: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_CODES = {np.dtype(text): code for code, text in _TYPES.items()}

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK", "a zip archive"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"GGUF", "a GGUF model"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
)


def read_container(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata and the arrays of a safetensors file, the arrays as read-only views of the file.

    Only the header is read; a header that claims what the file does not hold is refused before anything
    is allocated.

    Raises `InputError` when the file is missing, is something else, is cut short, or is inconsistent.
    """
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a trace is one .safetensors file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(path, file, size)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except PermissionError:
        raise InputError(f"{path}: this file may not be read; it needs read permission") from None
    metadata = _metadata(path, header.pop("__metadata__", {}))
    data_bytes = size - data_start
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    _check_layout(path, places, data_bytes)
    mapped = np.memmap(path, np.uint8, mode="r", shape=(size,))[data_start:]
    views = {
        # np.asarray drops the memmap class, whose every slice is slower; the mapping stays alive below.
        name: np.asarray(mapped[begin:end]).view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in places.items()
    }
    return metadata, views


def header_bytes(metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> bytes:
    """Return the length and header of the file that holds exactly this: a function of content alone."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, array in in_file_order(arrays):
        end = begin + array.nbytes
        entries[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def in_file_order(arrays: Mapping[str, Array]) -> list[tuple[str, Array]]:
    """Return the arrays in the file's order: wide elements first, so that all are aligned, then by name."""
    return sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def array_bytes(array: Array) -> Iterator[Array]:
    """Yield the array's rows in contiguous pieces, so that a view or a mapped file is never copied whole."""
    rows = max(1, 2**24 // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


def write_container(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
    """Write a safetensors file that is either whole or not there.

    Raises `InputError` when the folder does not exist, and `OSError` when the disk refuses; the file that
    was there before, if any, is then untouched.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; it must be there first")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            file.write(header_bytes(metadata, arrays))
            for _, array in in_file_order(arrays):
                for piece in array_bytes(array):
                    file.write(piece.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the offset at which the arrays begin."""
    if size == 0:
        raise InputError(f"{path}: the file is empty; a trace is a .safetensors file")
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or length > HEADER_LIMIT or head[8:] != b"{":
        raise InputError(_foreign(path, head))
    if 8 + length > size:
        raise InputError(f"{path}: the file is truncated: its header has {length:,} bytes, the file {size:,}; copy it again")
    try:
        header = json.loads(b"{" + file.read(length - 1), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object; the file is damaged")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _foreign(path: Path, head: bytes) -> str:
    """Return the sentence that says what a file looks like which is no safetensors file."""
    looks = next((words for magic, words in _SIGNATURES if head.startswith(magic)), "no known format")
    if looks == "a zip archive":
        looks = _kind_of_zip(path)
    return (
        f"{path}: this is not a .safetensors trace (it looks like {looks});"
        " `foregate trace import` converts recordings of other programs"
    )


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error):
        return "a damaged zip archive"
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch file, which holds a Python pickle"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy .npz archive"
    return "a zip archive"


def _metadata(path: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path}: __metadata__ must map names to texts; the file is damaged")
    return found


_Place = tuple[np.dtype[Any], tuple[int, ...], int, int]


def _place(path: Path, name: str, entry: object) -> _Place:
    """Return (type, shape, begin, end) of one array as the header claims it, if the claim fits together."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: the header entry of '{name}' must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _TYPES:
        raise InputError(f"{path}: '{name}' has element type {code!r}; allowed are {', '.join(_TYPES)}")
    if not _whole_numbers(shape) or len(shape) > AXES_LIMIT:
        raise InputError(f"{path}: '{name}' has shape {shape!r:.80}; it must be a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: '{name}' has data_offsets {offsets!r:.80}; they must be [begin, end]")
    dtype = np.dtype(_TYPES[code])
    begin, end = offsets
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != end - begin:
        raise InputError(
            f"{path}: '{name}' of shape {shape} needs {claimed:,} bytes, but its data_offsets span {end - begin:,}"
        )
    return dtype, tuple(shape), begin, end


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, places: Mapping[str, _Place], data_bytes: int) -> None:
    """Check that the arrays fill the file exactly: no hole, no overlap, nothing missing, nothing over."""
    reached = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            fault = "overlaps the array before it" if begin < reached else "leaves a hole before it"
            raise InputError(f"{path}: '{name}' {fault}: it begins at byte {begin:,}, and must at {reached:,}")
        reached = end
    if reached > data_bytes:
        raise InputError(
            f"{path}: the file is truncated: its header promises {reached:,} bytes of arrays,"
            f" and {data_bytes:,} are there; copy it again"
        )
    if reached < data_bytes:
        raise InputError(f"{path}: {data_bytes - reached:,} trailing bytes follow the last array, and none may")
