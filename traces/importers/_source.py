"""What importers share: a stranger's file, what its reader must add to it, and what is said of where it comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import MOST_EXPERTS, expert_dtype
from traces.errors import InputError
from traces.files import file_sha256
from traces.trace import DECODE, Array, Provenance

MAX_BYTES = 2**31
"""Bytes of a file that is read whole, unless the caller allows more."""

MOST_LAYERS = 2**15
"""Far above any model; an array is sized by it before the file has shown as many."""

LAST_POSITION = np.iinfo(np.int32).max

NOT_IN_THE_FILE = (
    "bytes of experts and of everything else",
    "KV bytes per token",
    "number of shared experts",
    "router logits",
    "lookahead observations",
)
"""What none of the formats below says."""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the file's content. Raises `InputError` when it cannot be read, is empty, or is above `max_bytes`."""
    check_file(path, max_bytes)
    return path.read_bytes()


def read_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line that is not empty.

    Raises `InputError` as `read_bytes`, and when the file is not UTF-8 text.
    """
    check_file(path, max_bytes)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start:,} is no UTF-8 text ({error.reason}); the format is text") from None


def check_file(path: Path, max_bytes: int) -> None:
    """Raise `InputError` unless the file can be read, holds something, and is within `max_bytes`."""
    whole(path, "options.max_bytes", max_bytes, least=1)
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a recording is one file")
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: this file may not be read; it needs read permission")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: the file is empty; a recording holds at least one token")
    if size > max_bytes:
        raise InputError(f"{path}: the file has {size:,} bytes, more than {max_bytes:,}; raise max_bytes if that is right")


def whole(path: Path, field: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Return `value`, which must be a whole number of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{path}: {field} is {value!r:.80}; it must be a whole number of at least {least}")
    if most is not None and value > most:
        raise InputError(f"{path}: {field} is {value}; it must be at most {most}")
    return value


def digits(path: Path, line: int, field: str, text: str, most: int = LAST_POSITION) -> int:
    """Return the whole number that `text`, a field of line `line`, writes in decimal digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
        raise InputError(f"{path}: line {line}: {field} is {text!r:.80}; it must be a whole number, 0 to {most}")
    return int(text)


def given(path: Path, option: str, value: int | None, meaning: str, least: int = 1, most: int | None = None) -> int:
    """Return the option `option`, a number that the file does not say and that is never guessed."""
    if value is None:
        raise InputError(f"{path}: the format does not say {meaning}; give it as options.{option}=NUMBER")
    return whole(path, f"options.{option}", value, least, most)


def given_experts(path: Path, value: int | None) -> int:
    """Return the option `experts`."""
    return given(path, "experts", value, "how many experts a layer has", most=MOST_EXPERTS)


def as_ids(path: Path, where: str, found: Array, experts: int) -> Array:
    """Return ids as the schema stores them; each must be an expert, or -1 for none.

    Checked before the conversion, which would quietly wrap around.
    """
    wrong = (found < -1) | (found >= experts)
    if wrong.any():
        raise InputError(f"{path}: {where} holds {found[wrong][0]}; an expert is 0 to {experts - 1}")
    return found.astype(expert_dtype(experts))


def one_by_one(request: Array, phase: Array) -> Array:
    """Return [T] int32 steps: one for each decode token, one for each request's prompt.

    For formats that do not say which tokens shared a forward pass. The tokens of a request lie together.
    """
    begins = np.ones(len(request), bool)
    begins[1:] = (phase[1:] == DECODE) | (request[1:] != request[:-1]) | (phase[1:] != phase[:-1])
    return (np.cumsum(begins) - 1).astype(np.int32)


def imported(path: Path, module: str, unknown: Sequence[str], options: Mapping[str, Any], **details: Any) -> Provenance:
    """Return the provenance of what the importer `module` read from `path`.

    `unknown` lists what this format cannot know beyond `NOT_IN_THE_FILE`; `options` are facts that came from the user
    and not from the file, None where not given; `details` is anything else worth keeping.
    """
    said = {name: value for name, value in options.items() if value is not None}
    about = {
        "file": path.name,
        "file_sha256": file_sha256(path),
        "unknown": [*unknown, *NOT_IN_THE_FILE],
        "given_by_the_user": said,
        **details,
    }
    return Provenance("imported", path.name, f"foregate {module} 1", about)
