"""llama.cpp's moe-trace: CSV with one `layer,expert` row for each routed activation.

Written by the example of llama.cpp PR 28544: for each pass and each MoE layer in turn, the experts of the pass's tokens,
token by token; the line ``layer,expert`` may stand first. A pass ends where the layer number falls. The file does not
say how many experts a token uses or how many there are; both have to be given. Passes of several tokens are taken for
the prompt, passes of one token for decode. The last layer may list one token or none in a prompt's pass: llama.cpp
computes it only where an output is asked for, and the other tokens use no expert there.

First versions of the tool wrote wrong experts for passes of several tokens; such files are recognised and refused
when a layer has 16 experts or more.

Cannot be known: gate weights; the order of a token's experts; whether a pass of one token was prompt; where one run
ends and another begins (the file is one request); numbers of experts; the model's name.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from traces.errors import InputError
from traces.importers._passes import Pass, trace_of_passes
from traces.importers._source import MAX_BYTES, MOST_LAYERS, digits, given, given_experts, imported, read_lines
from traces.trace import DECODE, PREFILL, Array, Trace


def read(
    path: Path,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    model_name: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Trace:
    """Return the recording at `path`; the module's docstring describes the format.

    `experts` is how many experts a layer has and `top_k` how many a token uses; both must be given. `model_name` is the
    model's name, otherwise the file's. `max_bytes` limits the file.

    Raises `InputError` when the file is damaged, incomplete or inconsistent, and when a needed option is not given.
    """
    experts = given_experts(path, experts)
    top_k = given(path, "top_k", top_k, "how many experts a token uses", most=experts)
    passes = list(_passes(path, _runs(path, max_bytes), top_k))
    if len({layer for one in passes for layer in one.layers}) == 1:
        raise InputError(f"{path}: all rows are of one layer, so that no pass's end shows; there must be two or more")
    unknown = (
        "gate weights",
        "order of a token's experts",
        "whether a pass of one token was prompt",
        "where one run ends and another begins",
        "name of the model",
    )
    options = {"experts": experts, "top_k": top_k, "model_name": model_name}
    return trace_of_passes(path, model_name or path.stem, experts, passes, imported(path, __name__, unknown, options))


def _runs(path: Path, max_bytes: int) -> Iterator[tuple[int, int, Array]]:
    """Yield the first line, the layer and the experts of each run of rows of one layer."""
    begun, current, experts = 0, -1, array("i")
    for number, line in read_lines(path, max_bytes):
        if number == 1 and line == "layer,expert":
            continue
        layer_text, comma, expert_text = line.partition(",")
        if not comma:
            raise InputError(f"{path}: line {number} is {line!r:.80}; it must be layer,expert")
        layer = digits(path, number, "layer", layer_text, most=MOST_LAYERS - 1)
        if layer != current and experts:
            yield begun, current, np.array(experts, np.int64)
            experts = array("i")
        if not experts:
            begun, current = number, layer
        experts.append(digits(path, number, "expert", expert_text))
    if experts:
        yield begun, current, np.array(experts, np.int64)


def _passes(path: Path, runs: Iterator[tuple[int, int, Array]], top_k: int) -> Iterator[Pass]:
    layers: dict[int, Array] = {}
    begun = 0
    for line, layer, experts in runs:
        if len(experts) % top_k:
            raise InputError(
                f"{path}: the {len(experts)} rows of layer {layer} from line {line} are no multiple of top_k {top_k}; the"
                " file may be truncated, or top_k another"
            )
        if layers and layer <= max(layers):
            yield _pass_of(begun, layers)
            layers = {}
        begun = begun if layers else line
        layers[layer] = experts.reshape(-1, top_k)
    if layers:
        yield _pass_of(begun, layers)


def _pass_of(line: int, layers: dict[int, Array]) -> Pass:
    several = len(next(iter(layers.values()))) > 1
    return Pass(f"the pass from line {line}", layers, PREFILL if several else DECODE)
