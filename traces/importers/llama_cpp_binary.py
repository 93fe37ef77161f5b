"""llama.cpp router probabilities in binary: RTRACE01, then one record for each token and layer.

Little-endian: the 8 bytes ``RTRACE01``, int32 number of experts, int32 version (1); then records of int32 token, int32
layer and one float32 probability for each expert. Tokens are numbered in the order of the text; the model's last layer
may lack records of prompt tokens, whose output nobody asked for, and those use no expert there.

The file holds probabilities and no choice. The experts are the `top_k` of highest probability, in descending order,
of equals the lower number first: right for a router that chooses so, wrong for one that adds a bias or chooses within
groups. The option `prompt_tokens` says how many of the tokens are prompt.

Cannot be known: which experts the router chose, strictly; gate weights (the model may have renormalised or scaled the
probabilities) and router logits; which tokens shared a step (every decode token is a step, and the prompt one); where
one run ends and another begins (the file is one request); the model's name.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from traces.checks import MOST_EXPERTS, expert_dtype
from traces.errors import InputError
from traces.importers._source import MAX_BYTES, check_file, given, imported, one_by_one, whole
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Trace

_MAGIC = b"RTRACE01"
_HEADER = struct.Struct("<8sii")
_VERSION = 1
_BLOCK = 4_000_000
"""Probabilities ranked at a time, so that a large file needs some tens of megabytes."""


def read(
    path: Path,
    *,
    top_k: int | None = None,
    prompt_tokens: int | None = None,
    model_name: str | None = None,
    max_bytes: int = 4 * MAX_BYTES,
) -> Trace:
    """Return the recording at `path`; the module's docstring describes the format.

    `top_k` is how many experts a token uses and `prompt_tokens` how many of the tokens, from the first, are prompt; both
    must be given. `model_name` is the model's name, otherwise the file's. `max_bytes` limits the file, which is mapped
    into memory.

    Raises `InputError` when the file is damaged, incomplete or inconsistent, and when a needed option is not given.
    """
    records, experts = _records(path, max_bytes)
    top_k = given(path, "top_k", top_k, "how many experts a token uses", most=experts)
    prompt = given(path, "prompt_tokens", prompt_tokens, "how many tokens are prompt", least=0)
    token, layer = records["token"].astype(np.int64), records["layer"].astype(np.int64)
    token -= _check_numbers(path, token, layer)
    layers, place = np.unique(layer, return_inverse=True)
    tokens = np.arange(int(token.max()) + 1, dtype=np.int32)
    phase = np.where(tokens < prompt, PREFILL, DECODE).astype(np.uint8)
    _check_complete(path, token, place, layers, phase)
    ids = np.full((len(phase), len(layers), top_k), -1, expert_dtype(experts))
    rows = max(1, _BLOCK // experts)
    for start in range(0, len(records), rows):
        block = slice(start, start + rows)
        ids[token[block], place[block]] = _highest(path, start, records["probability"][block], top_k)
    request = np.zeros(len(phase), np.int32)
    unknown = (
        "whether the router chose the experts of highest probability",
        "gate weights",
        "which tokens shared a step",
        "where one run ends and another begins",
        "name of the model",
    )
    options = {"top_k": top_k, "prompt_tokens": prompt, "model_name": model_name}
    return Trace(
        model=ModelSpec(model_name or path.stem, layers=len(layers), experts=experts, top_k=top_k),
        provenance=imported(path, __name__, unknown, options),
        domains=("",),
        experts=ids,
        request=request,
        position=tokens,
        step=one_by_one(request, phase),
        phase=phase,
    )


def _records(path: Path, max_bytes: int) -> tuple[Array, int]:
    """Return the records, mapped into memory, and the number of experts; the file's length must fit the header."""
    check_file(path, max_bytes)
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise InputError(f"{path}: it begins with {head[:8]!r}; the format begins with {_MAGIC!r} and two numbers")
    _, experts, version = _HEADER.unpack(head)
    if version != _VERSION:
        raise InputError(f"{path}: version is {version}; this program reads version {_VERSION}")
    whole(path, "experts", experts, least=1, most=MOST_EXPERTS)
    kind = np.dtype([("token", "<i4"), ("layer", "<i4"), ("probability", "<f4", (experts,))])
    size = path.stat().st_size - _HEADER.size
    if size == 0 or size % kind.itemsize:
        raise InputError(
            f"{path}: {size:,} bytes follow the header; a record of {experts} experts has {kind.itemsize:,}, so the file"
            " is truncated"
        )
    return np.memmap(path, kind, mode="r", offset=_HEADER.size), experts


def _check_numbers(path: Path, token: Array, layer: Array) -> int:
    """Return the first token's number. The numbers must not be negative, and not span more than there are records."""
    first, last = int(token.min()), int(token.max())
    if first < 0 or layer.min() < 0:
        raise InputError(f"{path}: a record has token {first}, layer {layer.min()}; both are numbered from 0")
    if last - first >= len(token):
        raise InputError(f"{path}: tokens {first} to {last} have {len(token)} records; each must have one in every layer")
    return first


def _check_complete(path: Path, token: Array, place: Array, layers: Array, phase: Array) -> None:
    """Check that every token has every layer once; the last layer may lack prompt tokens. Tokens count from 0 here."""
    for index, layer in enumerate(layers.tolist()):
        times = np.bincount(token[place == index], minlength=len(phase))
        wrong = times != 1
        if index == len(layers) - 1 > 0:
            wrong &= (times > 1) | (phase == DECODE)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(f"{path}: the file's token {at} has {times[at]} records of layer {layer}; it must have one")


def _highest(path: Path, start: int, probability: Array, top_k: int) -> Array:
    """Return [n, top_k] the experts of highest probability, descending; of equals the lower number first."""
    # Written so that NaN, which compares False, is caught too.
    bad = ~((probability >= 0) & (probability <= 1.01))
    if bad.any():
        record, expert = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: record {start + record}: the probability of expert {expert} is {probability[record, expert]}; it must"
            " be between 0 and 1"
        )
    return np.argsort(-probability, axis=1, kind="stable")[:, :top_k]
