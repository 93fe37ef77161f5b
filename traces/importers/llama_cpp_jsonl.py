"""llama.cpp top-k tensors as JSON lines: {"decode", "layer", "n_tokens", "n_used", "experts"}.

One line for each pass and MoE layer, as recorders write that watch llama.cpp's ``ffn_moe_topk`` tensors through its eval
callback: ``decode`` numbers the calls of llama_decode from 0, ``layer`` is the layer's number, ``experts`` lists for each
of ``n_tokens`` tokens the ``n_used`` experts. Call 0 is the prompt, every later call one generated token. A call whose
prompt exceeds the physical batch runs in several passes: one ends where the layer number does not rise. The last layer
may list one token or none in a prompt's pass: llama.cpp computes it only where an output is asked for, and the other
tokens use no expert there.

Recorders that read the tensor as if it were dense give wrong experts for passes of several tokens; such files are
recognised and refused when a layer has 16 experts or more.

Cannot be known: gate weights; the order of a token's experts; the number of experts, which has to be given; the
model's name. The file is one request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.importers._passes import Pass, trace_of_passes
from traces.importers._source import LAST_POSITION, MAX_BYTES, MOST_LAYERS, given_experts, imported, read_lines, whole
from traces.trace import DECODE, PREFILL, Array, Trace

_FIELDS = ("decode", "layer", "n_tokens", "n_used", "experts")


def read(path: Path, *, experts: int | None = None, model_name: str | None = None, max_bytes: int = MAX_BYTES) -> Trace:
    """Return the recording at `path`; the module's docstring describes the format.

    `experts` is how many experts a layer has and must be given. `model_name` is the model's name, otherwise the file's.
    `max_bytes` limits the file.

    Raises `InputError` when the file is damaged, incomplete or inconsistent, and when `experts` is not given.
    """
    experts = given_experts(path, experts)
    passes = list(_passes(path, max_bytes))
    unknown = ("gate weights", "order of a token's experts", "name of the model")
    options = {"experts": experts, "model_name": model_name}
    return trace_of_passes(path, model_name or path.stem, experts, passes, imported(path, __name__, unknown, options))


def _passes(path: Path, max_bytes: int) -> Iterator[Pass]:
    layers: dict[int, Array] = {}
    begun, current, used = 0, 0, 0
    for number, line in read_lines(path, max_bytes):
        found = _fields(path, number, line)
        decode, layer, ids = found["decode"], found["layer"], _ids(path, number, found)
        used = used or ids.shape[1]
        if ids.shape[1] != used:
            raise InputError(f"{path}: line {number}: n_used is {ids.shape[1]}, before it was {used}; all must agree")
        if decode < current:
            raise InputError(f"{path}: line {number}: decode falls from {current} to {decode}; calls must be in order")
        if decode > 0 and len(ids) > 1:
            raise InputError(f"{path}: line {number}: decode {decode} has {len(ids)} tokens; only decode 0 is the prompt")
        if layers and (decode != current or layer <= max(layers)):
            yield Pass(f"the pass from line {begun}", layers, DECODE if current else PREFILL)
            layers = {}
        begun = begun if layers else number
        current = decode
        layers[layer] = ids
    if layers:
        yield Pass(f"the pass from line {begun}", layers, DECODE if current else PREFILL)


def _fields(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number} is not valid JSON ({error}); each line must be an object") from None
    if not isinstance(found, dict) or not all(name in found for name in _FIELDS):
        raise InputError(f"{path}: line {number} is {line!r:.80}; it must be an object with {', '.join(_FIELDS)}")
    for name, most in (("decode", LAST_POSITION), ("layer", MOST_LAYERS - 1)):
        whole(path, f"line {number}: {name}", found[name], most=most)
    return found


def _ids(path: Path, number: int, found: Mapping[str, Any]) -> Array:
    """Return [n_tokens, n_used] ids."""
    tokens = whole(path, f"line {number}: n_tokens", found["n_tokens"], least=1)
    used = whole(path, f"line {number}: n_used", found["n_used"], least=1)
    try:
        ids = np.array(found["experts"])
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: line {number}: experts is no array ({error}); it must be [n_tokens, n_used]") from None
    if ids.dtype.kind != "i" or ids.shape != (tokens, used):
        raise InputError(
            f"{path}: line {number}: experts is {ids.dtype} of shape {list(ids.shape)}; it must be whole numbers,"
            f" [{tokens}, {used}]"
        )
    if ids.min() < 0:
        raise InputError(f"{path}: line {number}: experts holds {ids.min()}; an expert is a number from 0")
    return ids
