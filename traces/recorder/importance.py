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
    import torch

    refused = InputError(
        f"{name}: the experts' sum of {layer.name} is not added to a residual stream as it is, so residual_cosine has no"
        " meaning; record without it"
    )
    if layer.block is layer.decoder_layer:
        raise refused
    block, after = _rows(calls["block"]), _rows(calls["layer"])
    rounding = 4 * torch.finfo(calls["layer"].dtype).eps
    silenced = _silenced(layer, *calls["call"])
    of_experts, error = _multiple(_rows(calls["experts"]), block - silenced, size=block)
    if not error <= rounding:  # NaN is refused too
        raise refused
    # Others may come close by chance, where the block's output dwarfs them.
    best = None
    for module, tensor in calls["inputs"]:
        if tensor.shape == calls["layer"].shape:
            of_block, error = _multiple(block, after - _rows(tensor), size=after)
            if error <= rounding and (best is None or error <= best[0]):
                best = error, Residual(module, of_experts * of_block)
    if best is None:
        raise refused
    return best[1]


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


def _multiple(base: torch.Tensor, found: torch.Tensor, size: torch.Tensor) -> tuple[float, float]:
    """Return the c for which ``found = c x base`` fits best, and the largest error of a row, relative to that of `size`."""
    scale = (base * found).sum() / (base * base).sum()
    error = (found - scale * base).norm(dim=-1) / size.norm(dim=-1)
    return float(scale), float(error.max())
