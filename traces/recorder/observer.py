"""Hooks that read what each MoE layer does in a forward pass, and change nothing.

While the pass runs, tensors stay where they are: nothing is copied to the host and nothing waits for the device. Per
pass and array there is one tensor, [T, L, ...] for all rows of the pass, padding included; `Observer.collect` turns those of
several passes into the arrays of a trace, in one copy to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from traces.checks import expert_dtype
from traces.recorder.importance import Residual, output_norms, residual_cosine
from traces.recorder.layers import MoELayer, expert_count
from traces.recorder.lookahead import Lookahead
from traces.recorder.routers import RouterCall, RouterFacts, logarithm, logits_in
from traces.trace import Array

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """What is recorded besides routed experts and weights."""

    router_logits: str | None = None
    """``float16`` or ``float32``, None for no logits."""
    lookahead: int = 0
    """Depth D."""
    ranks: int = 0
    """M, the experts that each lookahead observation ranks."""
    expert_output_norm: bool = False
    residual_cosine: bool = False


class Observer:
    """Observes the passes that run inside its ``with`` block."""

    def __init__(
        self,
        layers: Sequence[MoELayer],
        top_k: int,
        wanted: Wanted,
        routers: Sequence[RouterFacts] | None = None,
        residuals: Sequence[Residual] | None = None,
    ) -> None:
        """`routers` are needed for logits and lookahead, `residuals` for the residual cosine, one per layer."""
        self.layers = layers
        self.experts = expert_count(layers[0].experts)
        self.top_k = top_k
        self.wanted = wanted
        self.routers = routers
        self.residuals = residuals
        self._handles: list[Any] = []
        self._lookahead: Lookahead | None = None
        if wanted.lookahead:
            assert routers is not None
            self._lookahead = Lookahead(routers, self.experts, wanted.lookahead, wanted.ranks)
        self._start_pass()

    def __enter__(self) -> Observer:
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.experts.register_forward_pre_hook(self._on_experts))
            if self.wanted.expert_output_norm or self.wanted.residual_cosine:
                self._handles.append(layer.experts.register_forward_hook(self._on_output(index)))
            if self.wanted.residual_cosine:
                assert self.residuals is not None
                self._handles.append(self.residuals[index].module.register_forward_pre_hook(self._on_residual(index)))
            if self.wanted.router_logits or self.wanted.lookahead:
                assert self.routers is not None
                hook = self._on_router(index)
                self._handles.append(self.routers[index].module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish_pass(self) -> Tensors:
        """Return what the pass showed, one tensor per array on the device, and be ready for the next."""
        seen: Tensors = {"experts": self._stacked(self._ids), "weights": self._stacked(self._weights)}
        if self.wanted.router_logits:
            seen["router_logits"] = self._stacked(self._logits)
        if self._lookahead is not None:
            seen["lookahead_experts"], seen["lookahead_scores"] = self._lookahead.finish_pass()
        if self.wanted.expert_output_norm:
            seen["expert_output_norm"] = self._stacked(self._norms)
        if self.wanted.residual_cosine:
            seen["residual_cosine"] = self._stacked(self._cosines)
        self._start_pass()
        return seen

    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return the type and the shape of one token's row of every array that is observed."""
        layers, ids, wanted = len(self.layers), expert_dtype(self.experts), self.wanted
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "experts": (ids, (layers, self.top_k)),
            "weights": (np.dtype(np.float32), (layers, self.top_k)),
        }
        if wanted.router_logits:
            found["router_logits"] = (np.dtype(wanted.router_logits), (layers, self.experts))
        if wanted.lookahead:
            found["lookahead_experts"] = (ids, (layers, wanted.lookahead, wanted.ranks))
            found["lookahead_scores"] = (np.dtype(np.float16), (layers, wanted.lookahead, wanted.ranks))
        if wanted.expert_output_norm:
            found["expert_output_norm"] = (np.dtype(np.float32), (layers, self.top_k))
        if wanted.residual_cosine:
            found["residual_cosine"] = (np.dtype(np.float32), (layers,))
        return found

    def collect(self, passes: Sequence[Mapping[str, torch.Tensor]]) -> PendingRows:
        """Begin to copy the rows of several passes to the host, in the arrays' own types."""
        import torch

        seen = {name: torch.cat([found[name] for found in passes]) for name in passes[0]}
        seen = in_descending_weight(seen, self.experts)
        for name, (dtype, _) in self.columns().items():
            seen[name] = seen[name].to(getattr(torch, dtype.name))
        return PendingRows(seen)

    # ---- what the hooks do -----------------------------------------------------------------------------------------

    def _start_pass(self) -> None:
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._cosines: list[torch.Tensor] = []
        self._residuals: dict[int, torch.Tensor] = {}

    def _on_experts(self, module: Any, args: tuple[Any, ...]) -> None:
        self._ids.append(args[1])
        self._weights.append(args[2])

    def _on_router(self, index: int) -> Any:
        assert self.routers is not None
        facts = self.routers[index]

        def hook(module: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if self.wanted.router_logits:
                logits = logits_in(output, self.experts)
                assert logits is not None  # the probe saw them
                self._logits.append(logarithm(logits) if facts.returns_probabilities else logits)
            if self._lookahead is not None:
                self._lookahead.on_router(index, RouterCall(args[0], args[1:], keywords))

        return hook

    def _on_residual(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._residuals[index] = args[0]

        return hook

    def _on_output(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self.wanted.expert_output_norm:
                self._norms.append(output_norms(module, *args[:3]))
            if self.wanted.residual_cosine:
                assert self.residuals is not None
                before = self._residuals.pop(index)
                self._cosines.append(residual_cosine(before, output, self.residuals[index].scale))

        return hook

    # ---- one tensor per array --------------------------------------------------------------------------------------

    def _stacked(self, per_layer: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [T, L, ...] of one tensor per layer; layers of smaller k are filled with the id after the last."""
        import torch

        device = per_layer[0].device
        if any(found.device != device for found in per_layer):
            per_layer = [found.to(device) for found in per_layer]
        widest = max(found.shape[-1] for found in per_layer) if per_layer[0].ndim > 1 else 0
        if any(found.ndim > 1 and found.shape[-1] != widest for found in per_layer):
            per_layer = [
                torch.nn.functional.pad(
                    found, (0, widest - found.shape[-1]), value=0 if found.is_floating_point() else self.experts
                )
                for found in per_layer
            ]
        return torch.stack(list(per_layer), dim=1)


class PendingRows:
    """Rows on their way from the device to the host."""

    def __init__(self, seen: Mapping[str, torch.Tensor]) -> None:
        import torch

        self._host = {}
        for name, tensor in seen.items():
            if tensor.device.type == "cuda":
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host[name] = pinned.copy_(tensor, non_blocking=True)
            else:
                self._host[name] = tensor.cpu()
        self._copied = []
        for device in {tensor.device for tensor in seen.values() if tensor.device.type == "cuda"}:
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
                self._copied.append(event)

    def arrays(self) -> dict[str, Array]:
        """Wait for the copies and return the arrays."""
        for event in self._copied:
            event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def in_descending_weight(seen: Tensors, experts: int) -> Tensors:
    """Order each token's experts by weight, equal weights by the router's own order; -1 and 0 where an id is no expert."""
    import torch

    weights = seen["weights"].float()
    absent = seen["experts"] >= experts
    order = torch.where(absent, -float("inf"), weights).argsort(dim=-1, descending=True, stable=True)
    ordered = {
        **seen,
        "experts": torch.where(absent, -1, seen["experts"]).gather(-1, order),
        "weights": torch.where(absent, 0, weights).gather(-1, order),
    }
    if "expert_output_norm" in seen:
        ordered["expert_output_norm"] = torch.where(absent, 0, seen["expert_output_norm"]).gather(-1, order)
    return ordered
