"""What the experts' outputs amount to: their norms, and how far their sum turns the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from traces.errors import InputError
from traces.recorder.layers import MoELayer, input_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Residual:
    """Where a layer's residual stream can be read before the experts' sum is added to it."""

    module: torch.nn.Module
    """The module whose input the residual stream is (the norm before the block, usually)."""
    scale: float
    """What the layer multiplies the experts' sum by when it adds it."""


def output_norms(experts: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each routed expert's own output, [T, k] float32, before any weight.

    The experts module is run once more for each of the k ranks, with one expert per token and weight 1; `forward` is called
    directly, so that no hook fires.
    """
    import torch

    ones = torch.ones_like(weights[:, :1])
    norms = [experts.forward(hidden, ids[:, k : k + 1], ones).float().norm(dim=-1) for k in range(ids.shape[1])]
    return torch.stack(norms, dim=-1)


def residual_cosine(before: torch.Tensor, experts_sum: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the cosine [T] float32 of the residual stream before and after the routed experts' sum is added."""
    import torch

    wide_sum = experts_sum.float().reshape(-1, experts_sum.shape[-1])
    wide = before.to(experts_sum.device).float().reshape(wide_sum.shape)
    return torch.nn.functional.cosine_similarity(wide, wide + scale * wide_sum, dim=-1)


def find_residuals(
    model: torch.nn.Module, name: str, layers: Sequence[MoELayer], token_ids: Sequence[int]
) -> list[Residual]:
    """Find, for every layer, the residual stream that the experts' sum is added to.

    One pass is watched. The residual stream is the input of a module of the decoder layer for which
    ``layer output = input + scale x block output`` holds for every token; that the block's output rises by the experts' sum,
    times a number, is seen by running the block once more with the experts silenced.

    Raises `InputError`, naming the layer, where that does not hold (a norm after the block, for instance).
    """
    import torch

    calls: dict[int, dict[str, Any]] = {index: {"inputs": []} for index in range(len(layers))}
    handles = [handle for index, layer in enumerate(layers) for handle in _watch(layer, calls[index])]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(token_ids)], device=input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        return [_residual(name, layer, calls[index]) for index, layer in enumerate(layers)]


def _watch(layer: MoELayer, calls: dict[str, Any]) -> list[Any]:
    """Hook one layer so that `calls` gets the inputs of its modules and the outputs of experts, block and layer."""
    inside = {id(module) for module in layer.block.modules()} - {id(layer.block)}

    def on_input(module: Any, args: tuple[Any, ...]) -> None:
        if args and hasattr(args[0], "is_floating_point") and args[0].is_floating_point():
            calls["inputs"].append((module, args[0]))

    def keep(what: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            calls[what] = output[0] if isinstance(output, tuple) else output
            if what == "block":
                calls["call"] = (args, keywords)

        return hook

    handles = [
        module.register_forward_pre_hook(on_input)
        for module in layer.decoder_layer.modules()
        if id(module) not in inside and module is not layer.decoder_layer
    ]
    for what, module in (("experts", layer.experts), ("block", layer.block), ("layer", layer.decoder_layer)):
        handles.append(module.register_forward_hook(keep(what), with_kwargs=True))
    return handles


def _residual(name: str, layer: MoELayer, calls: dict[str, Any]) -> Residual:
    refused = InputError(
        f"{name}: the experts' sum of {layer.name} is not added to a residual stream as it is, so residual_cosine has no"
        " meaning; record without it"
    )
    if layer.block is layer.decoder_layer:
        raise refused
    block, after = _rows(calls["block"]), _rows(calls["layer"])
    of_experts = _multiple(_rows(calls["experts"]), block - _silenced(layer, *calls["call"]))
    if of_experts is None:
        raise refused
    for module, tensor in reversed(calls["inputs"]):
        if tensor.numel() == after.numel():
            of_block = _multiple(block, after - _rows(tensor))
            if of_block is not None:
                return Residual(module, of_experts * of_block)
    raise refused


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().reshape(-1, tensor.shape[-1])


def _silenced(layer: MoELayer, args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """Return the block's output with the experts' sum set to 0."""
    import torch

    handle = layer.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        output = layer.block.forward(*args, **keywords)
    finally:
        handle.remove()
    return _rows(output[0] if isinstance(output, tuple) else output)


def _multiple(base: torch.Tensor, found: torch.Tensor) -> float | None:
    """Return c where ``found = c x base`` up to rounding in every row, else None."""
    scale = float((base * found).sum() / (base * base).sum().clamp(min=1e-30))
    error = (found - scale * base).norm(dim=-1)
    # Half-precision sums are rounded to a few parts in a hundred of what was added to them.
    return scale if bool((error <= 0.05 * (scale * base).norm(dim=-1)).all()) and scale != 0 else None
