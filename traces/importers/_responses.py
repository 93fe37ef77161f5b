"""Responses of inference servers, saved as JSON: one response, a list of them, or one to a line."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.importers._source import as_ids, one_by_one, read_bytes, whole
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Provenance, Trace

Response = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """The tokens of one request whose routing is known; they follow one another."""

    where: str
    """Response and field, for sentences."""
    ids: Array
    """[n, L, K] expert ids as in the response."""
    first: int
    """Position of the first."""
    prompt: int
    """How many of them are prompt; the rest was generated."""


def read_responses(path: Path, max_bytes: int) -> Iterator[tuple[str, Response]]:
    """Yield where each response stands, as words for sentences, and the response.

    Raises `InputError` when the file is neither JSON nor JSON lines, or a response is no object.
    """
    content = read_bytes(path, max_bytes)
    for where, response in _documents(path, content):
        if not isinstance(response, dict):
            raise InputError(f"{path}: {where} is {response!r:.80}; a response is a JSON object")
        yield where, response


def _documents(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        whole_file = json.loads(content)
    except (ValueError, RecursionError):
        yield from _lines(path, content)
        return
    if isinstance(whole_file, list):
        yield from ((f"response {number}", response) for number, response in enumerate(whole_file))
    else:
        yield "the response", whole_file


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is not valid JSON ({error}); the file must be JSON, or JSON lines, and whole"
            ) from None


def field(path: Path, where: str, found: Response, name: str, kind: type) -> Any:
    """Return ``found[name]``, which must be there and of type `kind` (dict, list or str)."""
    words: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    if not isinstance(found.get(name), kind):
        raise InputError(f"{path}: {where}: {name} is {found.get(name)!r:.80}; it must be {words[kind]}")
    return found[name]


def count(path: Path, where: str, found: Response, name: str) -> int:
    """Return ``found[name]``, which must be a whole number."""
    return whole(path, f"{where}: {name}", found.get(name))


def from_base64(path: Path, where: str, text: str) -> bytes:
    """Return the bytes that `text` encodes."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{path}: {where} is not valid base64 ({error})") from None


def choose_layers(path: Path, ids: Array, moe_layers: Sequence[int] | None) -> Array:
    """Return the layers `moe_layers` of `ids` [n, layers, K]; all where None is given."""
    if moe_layers is None or len(ids) == 0:
        return ids
    if not isinstance(moe_layers, list | tuple) or not moe_layers:
        raise InputError(f"{path}: moe_layers is {moe_layers!r:.80}; it must be a list of layer numbers")
    chosen = [whole(path, "moe_layers", layer, most=ids.shape[1] - 1) for layer in moe_layers]
    if chosen != sorted(set(chosen)):
        raise InputError(f"{path}: moe_layers is {chosen!r:.80}; layer numbers must rise")
    return ids[:, chosen]


def trace_of(path: Path, name: str, experts: int, requests: Sequence[Request], provenance: Provenance) -> Trace:
    """Return the trace of `requests`, one after another: gate weights and the order of a token's experts unknown.

    Raises `InputError` when they disagree about layers and top-k, hold what is no expert, or have no tokens.
    """
    requests = [request for request in requests if len(request.ids)]
    if not requests:
        raise InputError(f"{path}: no token's routing is known; at least one response must have it")
    shape = requests[0].ids.shape[1:]
    for request in requests:
        if request.ids.shape[1:] != shape:
            raise InputError(
                f"{path}: {request.where} has {request.ids.shape[1]} layers and top-{request.ids.shape[2]};"
                f" {requests[0].where} has {shape[0]} and top-{shape[1]}, and all must agree"
            )
        _refuse_repeated(path, request)
    ids = [as_ids(path, request.where, request.ids, experts) for request in requests]
    lengths = [len(request.ids) for request in requests]
    number = np.repeat(np.arange(len(requests), dtype=np.int32), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    phase = np.where(place < np.repeat([request.prompt for request in requests], lengths), PREFILL, DECODE).astype(np.uint8)
    return Trace(
        model=ModelSpec(name, layers=shape[0], experts=experts, top_k=shape[1]),
        provenance=provenance,
        domains=("",) * len(requests),
        experts=np.concatenate(ids),
        request=number,
        position=(place + np.repeat([request.first for request in requests], lengths)).astype(np.int32),
        step=one_by_one(number, phase),
        phase=phase,
        ranked=False,
    )


def _refuse_repeated(path: Path, request: Request) -> None:
    """Refuse a layer in which every token lists one expert K times: a dense layer, which engines leave as it was."""
    if request.ids.shape[2] == 1:
        return
    same = (request.ids == request.ids[..., :1]).all(axis=(0, 2))
    if same.any():
        layer = int(np.argmax(same))
        raise InputError(
            f"{path}: {request.where} lists expert {request.ids[0, layer, 0]} only, in every rank of layer {layer}; if that"
            " is no MoE layer, name those that are with options.moe_layers=[...]"
        )
