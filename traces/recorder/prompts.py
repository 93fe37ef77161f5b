"""Prompts: read from a file, each with the line it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.errors import InputError, nearest

_FIELDS = ("prompt", "token_ids", "domain")


@dataclass(frozen=True)
class Prompt:
    """One request, as a text or as token ids."""

    place: str
    """File and line, for errors."""
    text: str | None
    token_ids: tuple[int, ...] | None
    domain: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from `path`: one JSON object per line in a ``.jsonl`` file, one text per line in any other.

    An object has ``prompt`` (a text) or ``token_ids`` (a list of whole numbers), and may have ``domain`` (a text). Lines
    with nothing but white space are skipped.

    Raises `InputError`, which names file, line and field, when the file cannot be read, holds no prompt, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; prompts must be a text file or a .jsonl file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; prompts must be a text file or a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; prompts must be UTF-8 text") from None
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = [parse(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: there is no prompt; write one per line")
    return prompts


def tokenize(prompts: Sequence[Prompt], encode: Callable[[str], Sequence[int]] | None) -> list[tuple[int, ...]]:
    """Return the token ids of every prompt; `encode` turns a text into ids, None where there is no tokenizer.

    Raises `InputError` for a text without a tokenizer, and for a prompt of no tokens.
    """
    tokenized = []
    for prompt in prompts:
        ids = prompt.token_ids
        if ids is None:
            if encode is None:
                raise InputError(f"{prompt.place}: prompt is a text, but the model has no tokenizer; give token_ids instead")
            ids = tuple(encode(prompt.text or ""))
        if not ids:
            raise InputError(f"{prompt.place}: the prompt has no tokens; it must have at least one")
        tokenized.append(ids)
    return tokenized


def digest(prompts: Sequence[Prompt]) -> str:
    """Return a sha256 of what the prompts say, wherever they come from."""
    content = [[prompt.text, prompt.token_ids, prompt.domain] for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _from_text(place: str, line: str) -> Prompt:
    return Prompt(place, line, None)


def _from_json(place: str, line: str) -> Prompt:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{place}: this is not JSON ({error}); write {{"prompt": TEXT}}') from None
    if not isinstance(found, dict):
        raise InputError(f'{place}: this is no JSON object; write {{"prompt": TEXT}}')
    for field in found:
        if field not in _FIELDS:
            raise InputError(f"{place}: unknown field '{field}'; {nearest(field, _FIELDS)}")
    if ("prompt" in found) == ("token_ids" in found):
        raise InputError(f"{place}: there must be either prompt or token_ids")
    text, domain = found.get("prompt", ""), found.get("domain", "")
    for field, value in (("prompt", text), ("domain", domain)):
        if not isinstance(value, str):
            raise InputError(f"{place}: {field} is {value!r:.80}; it must be a text")
    if "token_ids" not in found:
        return Prompt(place, text, None, domain)
    return Prompt(place, None, _token_ids(place, found["token_ids"]), domain)


def _token_ids(place: str, found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(value) is int and value >= 0 for value in found):
        raise InputError(f"{place}: token_ids is {found!r:.80}; it must be a list of whole numbers from 0")
    return tuple(found)
