"""vLLM's returned routed experts: responses of a server started with --enable-return-routed-experts, as JSON.

The file is one response of ``/v1/completions`` or ``/v1/chat/completions``, a list of them, or one to a line. Two
layouts exist. In the documented one of vLLM 0.21 (docs/training/routed_experts_replay.md) the response has
``prompt_routed_experts`` [prompt tokens, MoE layers, k] and each of its ``choices`` has ``routed_experts`` [generated
tokens or fewer, MoE layers, k], int16 expert ids; the prompt's rows stand for all choices. Before (PR 28284) and after
it (base64 text of a ``.npy`` array) there is no prompt field and ``routed_experts`` holds the whole sequence but its
last token: then ``usage.prompt_tokens`` says where the prompt ends. Either layout may hold lists or base64 ``.npy``.

    response = requests.post(url + "/v1/completions", json={...}).json()
    file.write(json.dumps(response) + "\\n")

and with the Python interface, for each output of ``LLM.generate``:

    file.write(json.dumps({
        "prompt_routed_experts": output.prompt_routed_experts.tolist(),
        "choices": [{"routed_experts": choice.routed_experts.tolist()} for choice in output.outputs],
    }) + "\\n")

Where the prompt's prefix came from the prefix cache, vLLM 0.21 gives -1 in all layers: what the router would have chosen
is unknown, which is not the same as choosing no expert. Those tokens are left out, the others keep their positions,
and ``cached_tokens_left_out`` in the provenance counts them. Later versions give the routing of the pass that filled
the cache, and do not mark it.

Cannot be known: gate weights; the order of a token's experts (vLLM does not promise one); which tokens shared a step
(every decode token is a step, and every prompt one); the number of experts, which has to be given. Each choice is a
request; the prompt of several choices was computed once and belongs to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.importers._npz import array_of_npy
from traces.importers._responses import Request, Response, choose_layers, count, field, from_base64, read_responses, trace_of
from traces.importers._source import MAX_BYTES, given_experts, imported
from traces.trace import Array, Trace


def read(
    path: Path,
    *,
    experts: int | None = None,
    model_name: str | None = None,
    moe_layers: Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Trace:
    """Return the routing of the responses in `path`; the module's docstring describes the format.

    `experts` is how many experts a layer has and must be given. `model_name` replaces the ``model`` of the first
    response, or the file's name where it says none. `moe_layers` names the MoE layers among those listed, for versions
    that list all. `max_bytes` limits the file.

    Raises `InputError` when the file is damaged, incomplete or inconsistent, and when `experts` is not given.
    """
    experts = given_experts(path, experts)
    requests: list[Request] = []
    said_name = ""
    cached = 0
    for where, response in read_responses(path, max_bytes):
        said_name = said_name or (response["model"] if isinstance(response.get("model"), str) else "")
        for request in _requests(path, where, response, moe_layers):
            known = _without_cached_prefix(path, request)
            cached += len(request.ids) - len(known.ids)
            requests.append(known)
    unknown = ("gate weights", "order of a token's experts", "which tokens shared a step")
    provenance = imported(
        path,
        __name__,
        unknown if said_name else (*unknown, "name of the model"),
        {"experts": experts, "model_name": model_name, "moe_layers": moe_layers},
        cached_tokens_left_out=cached,
    )
    return trace_of(path, model_name or said_name or path.stem, experts, requests, provenance)


def _requests(path: Path, where: str, response: Response, moe_layers: Sequence[int] | None) -> list[Request]:
    """Return one request for each choice of the response."""
    choices = field(path, where, response, "choices", list)
    split = response.get("prompt_routed_experts") is not None
    prompt = _array(path, f"{where}: prompt_routed_experts", response["prompt_routed_experts"]) if split else None
    found = []
    for index, choice in enumerate(choices):
        at = f"{where}: choices[{index}].routed_experts"
        if not isinstance(choice, dict) or choice.get("routed_experts") is None:
            raise InputError(
                f"{path}: {at} is missing; the server must run with --enable-return-routed-experts, and gives none for"
                " a request that it preempted"
            )
        ids = _array(path, at, choice["routed_experts"])
        if prompt is not None:
            request = _after_prompt(path, at, prompt, ids, with_prompt=index == 0)
        else:
            request = _whole_sequence(path, where, at, response, ids, with_prompt=index == 0)
        found.append(Request(at, choose_layers(path, request.ids, moe_layers), request.first, request.prompt))
    return found


def _after_prompt(path: Path, at: str, prompt: Array, ids: Array, *, with_prompt: bool) -> Request:
    """Return the choice whose generated tokens are `ids`; the first choice has the prompt's tokens too."""
    if not with_prompt:
        return Request(at, ids, first=len(prompt), prompt=0)
    if len(ids) == 0:  # one token was generated, and the last is never routed
        return Request(at, prompt, first=0, prompt=len(prompt))
    if prompt.shape[1:] != ids.shape[1:]:
        raise InputError(
            f"{path}: {at} has shape {list(ids.shape)}, prompt_routed_experts {list(prompt.shape)}; layers and k must agree"
        )
    return Request(at, np.concatenate([prompt, ids]), first=0, prompt=len(prompt))


def _whole_sequence(path: Path, where: str, at: str, response: Response, ids: Array, *, with_prompt: bool) -> Request:
    """Return the choice whose prompt and generated tokens are `ids`."""
    prompt = count(path, f"{where}: usage", field(path, where, response, "usage", dict), "prompt_tokens")
    if len(ids) < prompt:
        raise InputError(
            f"{path}: {at} has {len(ids)} tokens, fewer than the prompt's {prompt}; it must hold the whole sequence"
            " (routed_experts_prompt_start left at 0)"
        )
    return Request(at, ids, 0, prompt) if with_prompt else Request(at, ids[prompt:], prompt, 0)


def _array(path: Path, where: str, value: Any) -> Array:
    """Return [tokens, layers, k] from nested lists or from the base64 text of an .npy file."""
    if isinstance(value, str):
        ids = array_of_npy(f"{path}: {where}", from_base64(path, where, value))
    else:
        ids = _array_of_lists(path, where, value)
    if ids.dtype.kind not in "iu" or ids.ndim != 3 or 0 in ids.shape[1:]:
        raise InputError(
            f"{path}: {where} is {ids.dtype} of shape {list(ids.shape)}; it must be whole numbers, [tokens, layers, k]"
        )
    return ids.astype(np.int64)


def _array_of_lists(path: Path, where: str, value: Any) -> Array:
    if value == []:
        return np.zeros((0, 1, 1), np.int64)
    try:
        return np.array(value)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: {where} is no array ({error}); it must be [tokens, layers, k]") from None


def _without_cached_prefix(path: Path, request: Request) -> Request:
    """Return the request without its first tokens that are -1 throughout: they came from the prefix cache."""
    absent = (request.ids == -1).all(axis=(1, 2))
    cached = len(absent) if absent.all() else int(np.argmin(absent))
    kept = request.ids[cached:]
    if (kept == -1).any():
        token = request.first + cached + int(np.argmax((kept == -1).any(axis=(1, 2))))
        raise InputError(
            f"{path}: {request.where} holds -1 at position {token}; only a cached prefix has it, in all layers of a token"
        )
    return Request(request.where, kept, request.first + cached, max(request.prompt - cached, 0))
