"""Read `.npz` archives and `.npy` arrays of strangers: no pickles, and no surprises about size."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from traces.errors import InputError
from traces.trace import Array

RATIO_LIMIT = 200
"""Most bytes that one compressed byte may become. Routing ids and weights shrink to a third at best; a
decompression bomb reaches 1,000."""

SMALL = 2**20
"""Bytes below which the ratio does not matter: a small constant array compresses well and hurts nobody."""


_UNPACKING = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
"""What `zipfile` raises for damaged, encrypted and exotic entries."""


class NpzArchive:
    """The arrays of one `.npz` file, each judged by its claims before it is unpacked.

    Raises `InputError` from every method when the archive is not what it should be.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._headers: dict[str, tuple[tuple[int, ...], bool, np.dtype[Any], int]] = {}
        try:
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such file") from None
        except IsADirectoryError:
            raise InputError(f"{path}: this is a folder; an .npz archive is one file") from None
        except (*_UNPACKING, ValueError, struct.error) as error:
            raise InputError(
                f"{path}: this is no whole .npz archive ({error}); it may be truncated or another format (format=NAME)"
            ) from None
        try:
            self._check(max_bytes)
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> NpzArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def names(self) -> list[str]:
        """Return the names of the arrays."""
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the array `name`, without reading it."""
        return self._header(name)[0]

    def read(self, name: str, dtypes: str, axes: int) -> Array:
        """Return the array `name`, which must have `axes` axes and a type whose kind is in `dtypes`.

        Kinds are NumPy's letters: ``u`` and ``i`` whole numbers, ``f`` floats, ``U`` texts.
        """
        shape, fortran, dtype, start = self._header(name)
        if dtype.kind not in dtypes:
            wanted = " or ".join(_KINDS[kind] for kind in dtypes)
            raise InputError(f"{self.path}: '{name}' is {dtype}; it must be {wanted}")
        if len(shape) != axes:
            raise InputError(f"{self.path}: '{name}' has shape {list(shape)}; it must have {axes} axes")
        count = math.prod(shape) * dtype.itemsize
        try:
            with self._archive.open(f"{name}.npy") as file:
                file.read(start)
                data = file.read(count)
                # Reading past the end makes zipfile compare the checksum.
                over = file.read(1)
        except _UNPACKING as error:
            raise InputError(f"{self.path}: '{name}' cannot be unpacked ({error}); copy it again") from None
        if len(data) != count or over:
            raise InputError(f"{self.path}: '{name}' is not the {count:,} bytes that its header promises")
        array = np.frombuffer(data, dtype)
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        if name not in self._headers:
            raise InputError(f"{self.path}: the array '{name}' is missing; the archive has {', '.join(self.names())}")
        return self._headers[name]

    def _check(self, max_bytes: int) -> None:
        """Read every array's header and compare its claims with the archive's and with the limit."""
        total = 0
        for entry in self._archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename:
                raise InputError(f"{self.path}: it holds '{name}'; an .npz archive holds .npy arrays only")
            total += entry.file_size
            if total > max_bytes:
                raise InputError(
                    f"{self.path}: its arrays claim more than {max_bytes:,} bytes unpacked; raise max_bytes if that is right"
                )
            if entry.file_size > max(SMALL, RATIO_LIMIT * entry.compress_size):
                raise InputError(
                    f"{self.path}: '{name}' claims {entry.file_size:,} bytes out of {entry.compress_size:,};"
                    f" more than {RATIO_LIMIT}:1 looks like a decompression bomb"
                )
            if name in self._headers:
                raise InputError(f"{self.path}: the array '{name}' is there twice; each must be there once")
            self._headers[name] = self._read_header(name, entry)

    def _read_header(self, name: str, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        try:
            with self._archive.open(entry) as file:
                shape, fortran, dtype = _read_npy_header(file)
                start = file.tell()
        except _UNPACKING as error:
            raise InputError(f"{self.path}: '{name}' cannot be unpacked ({error}); copy it again") from None
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError) as error:
            raise InputError(f"{self.path}: '{name}' has no valid .npy header ({error})") from None
        if dtype.hasobject:
            raise InputError(f"{self.path}: '{name}' holds Python objects (a pickle); it must hold numbers")
        if dtype.itemsize == 0 or min(shape, default=0) < 0:
            raise InputError(f"{self.path}: '{name}' claims the impossible: {dtype} of shape {list(shape)}")
        claimed = start + math.prod(shape) * dtype.itemsize
        if claimed != entry.file_size:
            raise InputError(
                f"{self.path}: '{name}' of shape {list(shape)} needs {claimed:,} bytes,"
                f" but the archive says {entry.file_size:,}"
            )
        return shape, fortran, dtype, start


_KINDS = {"u": "unsigned whole numbers", "i": "whole numbers", "f": "floats", "U": "texts"}


def array_of_npy(name: str, content: bytes) -> Array:
    """Return the array that `content`, the bytes of an .npy file, holds; `name` begins the sentence of a rejection.

    Nothing is allocated: the header's claim must match the bytes that are there. Raises `InputError` when it does not.
    """
    file = io.BytesIO(content)
    try:
        shape, fortran, dtype = _read_npy_header(file)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError) as error:
        raise InputError(f"{name} has no valid .npy header ({error})") from None
    data = content[file.tell() :]
    if dtype.hasobject:
        raise InputError(f"{name} holds Python objects (a pickle); it must hold numbers")
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"{name} claims {dtype} of shape {list(shape)}, but holds {len(data):,} bytes")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"its version is {version[0]}.{version[1]}, and 1.0 and 2.0 are known")
