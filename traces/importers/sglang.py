"""SGLang's returned routed experts: responses of a server started with --enable-return-routed-experts, as JSON.

The file is one response of ``/generate`` to a request with ``"return_routed_experts": true``, a list of them, or one to a
line. ``meta_info.routed_experts`` is the base64 text of little-endian int32 expert ids, [tokens, layers, k] flattened;
the tokens are the whole sequence but its last token: ``prompt_tokens + completion_tokens - 1`` (SGLang PR 12162). The
text does not say its shape, so the number of layers listed and k have to be given; they must fit its length exactly,
which also refuses responses to requests with ``routed_experts_start_len``. Versions that send
``meta_info.expert_ids_schema`` say both (``num_layers``, ``top_k``), and which of the layers are MoE layers
(``moe_layer_ids``).

    response = requests.post(url + "/generate", json={..., "return_routed_experts": True}).json()
    file.write(json.dumps(response) + "\\n")

Models whose first layers are dense list those layers too: name the MoE layers then (`moe_layers`).

Cannot be known: gate weights; the order of a token's experts (SGLang sorts them for some models only); which tokens
shared a step (every decode token is a step, and every prompt one); which prompt tokens came from the prefix cache (their
routing is that of the pass that filled it); the number of experts, which has to be given; the model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from traces.errors import InputError
from traces.importers._responses import Request, Response, choose_layers, count, field, from_base64, read_responses, trace_of
from traces.importers._source import MAX_BYTES, MOST_LAYERS, given, given_experts, imported, whole
from traces.trace import Trace


def read(
    path: Path,
    *,
    experts: int | None = None,
    layers: int | None = None,
    top_k: int | None = None,
    model_name: str | None = None,
    moe_layers: Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Trace:
    """Return the routing of the responses in `path`; the module's docstring describes the format.

    `experts` is how many experts a layer has, `layers` how many layers the response lists and `top_k` how many experts
    of each; the latter two must be given unless the response has a schema. `moe_layers` names the MoE layers among
    those listed; all where it is not given and the schema does not say. `model_name` is the model's name, otherwise
    the file's. `max_bytes` limits the file.

    Raises `InputError` when the file is damaged, incomplete or inconsistent, and when a needed option is not given.
    """
    experts = given_experts(path, experts)
    requests = [
        _request(path, where, field(path, where, response, "meta_info", dict), layers, top_k, moe_layers)
        for where, response in read_responses(path, max_bytes)
    ]
    unknown = (
        "gate weights",
        "order of a token's experts",
        "which tokens shared a step",
        "which prompt tokens came from the prefix cache",
        "name of the model",
    )
    options = {
        "experts": experts,
        "layers": layers,
        "top_k": top_k,
        "model_name": model_name,
        "moe_layers": moe_layers,
    }
    return trace_of(path, model_name or path.stem, experts, requests, imported(path, __name__, unknown, options))


def _request(
    path: Path, where: str, meta: Response, layers: int | None, top_k: int | None, moe_layers: Sequence[int] | None
) -> Request:
    where = f"{where}: meta_info"
    schema = field(path, where, meta, "expert_ids_schema", dict) if "expert_ids_schema" in meta else {}
    layers = _said(path, where, schema, "num_layers", "layers", layers, "how many layers it lists")
    top_k = _said(path, where, schema, "top_k", "top_k", top_k, "how many experts a token uses")
    prompt = count(path, where, meta, "prompt_tokens")
    tokens = max(prompt + count(path, where, meta, "completion_tokens") - 1, 0)
    at = f"{where}.routed_experts"
    data = from_base64(path, at, field(path, where, meta, "routed_experts", str))
    if len(data) != 4 * tokens * layers * top_k:
        raise InputError(
            f"{path}: {at} has {len(data):,} bytes; {tokens} tokens (all but the last) x {layers} layers x top-{top_k}"
            f" int32 are {4 * tokens * layers * top_k:,}"
        )
    ids = np.frombuffer(data, "<i4").reshape(tokens, layers, top_k)
    chosen = choose_layers(path, ids, moe_layers or schema.get("moe_layer_ids"))
    if (chosen < 0).any():
        raise InputError(f"{path}: {at} holds {chosen[chosen < 0][0]}; an expert is a number from 0")
    return Request(at, chosen, first=0, prompt=min(prompt, tokens))


def _said(path: Path, where: str, schema: Response, name: str, option: str, value: int | None, meaning: str) -> int:
    """Return what the schema says as `name`, or else the option `option`; where both speak they must agree."""
    if name not in schema:
        return given(path, option, value, meaning, most=MOST_LAYERS)
    said = whole(path, f"{where}.expert_ids_schema.{name}", schema[name], least=1, most=MOST_LAYERS)
    if value is not None and value != said:
        raise InputError(f"{path}: options.{option} is {value!r:.80}; {where}.expert_ids_schema.{name} is {said}")
    return said
