"""The MoE layers of a model as transformers builds them: where routing can be observed.

Every architecture that keeps its experts behind transformers' experts interface calls ``experts(hidden, ids, weights)`` in
each MoE layer, and has a router beside the experts. Nothing here knows an architecture by name: what is not found by these
two marks is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traces.checks import MOST_EXPERTS
from traces.errors import InputError
from traces.trace import ModelSpec

if TYPE_CHECKING:
    import torch

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""Attributes that transformers' experts interface gives to every experts module."""

_PRECISIONS = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model."""

    name: str
    """Of the experts module, as the model calls it, e.g. ``model.layers.3.mlp.experts``."""
    experts: torch.nn.Module
    """Called with (hidden [T, H], ids [T, k], weights [T, k])."""
    block: torch.nn.Module
    """The module that holds the experts, and the router among its other children."""
    decoder_layer: torch.nn.Module
    """The element of the model's list of layers that holds the block."""


def moe_layers(model: torch.nn.Module, name: str) -> list[MoELayer]:
    """Return the model's MoE layers, first to last. `name` is what errors call the model.

    Raises `InputError` when there is none, when experts are kept in a way that cannot be observed, or when layers differ in
    their number of experts.
    """
    modules = dict(model.named_modules())
    found = [path for path, module in modules.items() if all(hasattr(module, mark) for mark in _MARKS)]
    if not found:
        raise InputError(f"{name}: {_why_none(modules)}")
    layers = [
        MoELayer(path, modules[path], modules[path.rpartition(".")[0]], modules[_decoder_layer(path, modules)])
        for path in found
    ]
    counts = {path: expert_count(modules[path]) for path in found}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise InputError(
            f"{name}: {few} has {counts[few]} experts and {many} has {counts[many]};"
            " a trace needs the same number in every layer"
        )
    if counts[found[0]] > MOST_EXPERTS:
        raise InputError(f"{name}: {found[0]} has {counts[found[0]]} experts; at most {MOST_EXPERTS} can be numbered")
    return layers


def expert_count(experts: torch.nn.Module) -> int:
    """Return how many experts a fused experts module holds: the first axis of its parameters, if it has them itself."""
    held = next(experts.parameters(), None)
    return int(experts.num_experts if held is None else held.shape[0])


def input_device(model: Any) -> torch.device:
    """Return the device on which the model wants its token ids."""
    embedding = next(model.get_input_embeddings().parameters())
    if embedding.device.type != "meta":
        return embedding.device
    # Parameters that are kept off the device until they are used: the model's hooks move the inputs.
    kept = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    import torch

    return next(kept, torch.device("cpu"))


def model_spec(model: torch.nn.Module, name: str, layers: list[MoELayer], top_k: int, kv_bytes: int | None) -> ModelSpec:
    """Describe the model: bytes are counted from the parameters themselves, as they lie in memory."""
    experts = expert_count(layers[0].experts)
    of_experts = [sum(parameter.nbytes for parameter in layer.experts.parameters()) for layer in layers]
    parameters = list(layers[0].experts.parameters())
    # Layers of different width have no bytes of one expert.
    same = len(set(of_experts)) == 1
    precision = _PRECISIONS.get(str(parameters[0].dtype), str(parameters[0].dtype).removeprefix("torch."))
    hidden_size = getattr(_text_config(model), "hidden_size", None)
    down = getattr(layers[0].experts, "down_proj", None)
    width = None if down is None or not hidden_size or down.ndim != 3 else down[0].numel() // hidden_size
    return ModelSpec(
        name=name,
        layers=len(layers),
        experts=experts,
        top_k=top_k,
        shared_experts=_shared_experts(model, layers[0]),
        hidden_size=hidden_size,
        expert_width=width or None,
        expert_bytes={precision: of_experts[0] // experts} if same and of_experts[0] else {},
        other_bytes=sum(parameter.nbytes for parameter in model.parameters()) - sum(of_experts),
        kv_bytes_per_token=kv_bytes,
    )


def _decoder_layer(path: str, modules: Mapping[str, Any]) -> str:
    """Return the nearest module around `path` that is an element of a list of layers, else the module right around it."""
    inner = path
    while inner:
        outer = inner.rpartition(".")[0]
        if type(modules[outer]).__name__ == "ModuleList":
            return inner
        inner = outer
    return path.rpartition(".")[0]


def _why_none(modules: Mapping[str, Any]) -> str:
    """Say why no layer was found: no experts at all, or experts that the model keeps out of sight."""
    architecture = type(modules[""]).__name__
    hidden = [path for path, module in modules.items() if _looks_sparse(path, type(module).__name__)]
    if not hidden:
        return f"{architecture} has no MoE layers; there is no routing to record"
    return (
        f"{architecture} cannot be recorded: {hidden[0]} ({type(modules[hidden[0]]).__name__}) does not go through"
        " transformers' experts interface, where routed experts and weights are observed"
    )


def _looks_sparse(path: str, class_name: str) -> bool:
    return "expert" in path.rpartition(".")[2] or "Expert" in class_name or class_name.endswith(("MoE", "MoeBlock"))


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _shared_experts(model: torch.nn.Module, layer: MoELayer) -> int:
    """Return the number of shared experts: as the configuration counts them, else 1 where the block has some."""
    beside = [name for name, _ in layer.block.named_children() if "shared" in name]
    counted = [
        value
        for field, value in sorted(_text_config(model).to_dict().items())
        if "shared_expert" in field and ("num" in field or field.startswith("n_")) and type(value) is int
    ]
    if counted:
        return int(counted[0])
    return 1 if beside else 0
