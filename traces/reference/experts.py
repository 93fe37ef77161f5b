"""The experts of an MoE layer for training: the arithmetic of transformers' own, with a faster backward pass.

The stock backward pass of a gather is a scatter that accumulates; for the many small experts here it takes
longer than the matrix products. Here each token's copies lie in places that are known, so that both directions
are gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface

NAME = "foregate_training"
"""Of these experts, as an ``experts_implementation``."""

# Younger versions of torch have it under its public name.
_grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def register_training_experts(activation: Activation) -> None:
    """Make ``experts_implementation=NAME`` compute experts with gathers only, and with `activation`.

    The module of the experts then has ``tokens_per_expert``, [E] of the last call, for the balancing loss.
    """

    def forward(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        top_k = ids.size(-1)
        order, place, ends = sort_by_expert(ids, self.num_experts)
        self.tokens_per_expert = torch.diff(ends, prepend=ends.new_zeros(1))
        token = order // top_k
        copies = _Dispatch.apply(hidden, token, place, top_k)
        gate_up = _grouped_mm(copies, self.gate_up_proj.transpose(-2, -1), offs=ends)
        inner = activation(gate_up, _Permute.apply(weights.reshape(-1), order, place))
        outputs = _grouped_mm(inner, self.down_proj.transpose(-2, -1), offs=ends)
        return _Combine.apply(outputs, token, place, top_k)

    ExpertsInterface.register(NAME, forward)


def sort_by_expert(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how [T, K] expert ids are grouped by expert; there may be 256 experts.

    The first result, [T K], is the pair (token, rank) at each place of the grouped order; the second, [T K],
    the place of each pair; the third, [E] int32, the places at which the groups end.
    """
    # A byte holds the number of any expert here, and sorts fastest.
    grouped, order = torch.sort(ids.reshape(-1).to(torch.uint8), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    numbers = torch.arange(experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(grouped.to(torch.int32), numbers, right=True, out_int32=True)
    return order, place, ends


def weighted_swiglu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return SwiGLU of [n, 2 I] times the routing weights [n], in single precision inside.

    The weight before the down projection gives the same as after it, at a third of the width.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up * weights.float().unsqueeze(-1)).to(gate_up.dtype)


def fastest_activation(width: int, rows: int, device: torch.device) -> tuple[Activation, str]:
    """Return `weighted_swiglu`, compiled where that works and agrees, and how it was obtained.

    `width` is one expert's, `rows` the (token, expert) pairs of a step. One fused kernel instead of eight.
    """
    if device.type != "cuda":
        return weighted_swiglu, "eager"
    try:
        compiled: Activation = torch.compile(weighted_swiglu, dynamic=False)
        gate_up = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.rand(rows, device=device, dtype=torch.bfloat16, requires_grad=True)
        found, expected = compiled(gate_up, weights), weighted_swiglu(gate_up, weights)
        found.sum().backward()
        error = float((found - expected).detach().float().norm() / expected.detach().float().norm())
    except Exception as fault:  # a machine without a compiler can still train, only slower
        return weighted_swiglu, f"eager, because compiling failed: {fault}"[:300]
    return (compiled, "compiled") if error < 1e-2 else (weighted_swiglu, f"eager, because compiled differs by {error:.2g}")


class _Dispatch(torch.autograd.Function):
    """[T, H] to [T K, H]: each token's copies, grouped by expert."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, token: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        context.save_for_backward(place)
        context.top_k = top_k
        return hidden.index_select(0, token)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        (place,) = context.saved_tensors
        of_pairs = gradient.index_select(0, place).view(-1, context.top_k, gradient.size(1))
        return of_pairs.sum(dim=1), None, None, None


class _Combine(torch.autograd.Function):
    """[T K, H] to [T, H]: the sum of each token's outputs."""

    @staticmethod
    def forward(context: Any, outputs: torch.Tensor, token: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        context.save_for_backward(token)
        return outputs.index_select(0, place).view(-1, top_k, outputs.size(1)).sum(dim=1)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        (token,) = context.saved_tensors
        return gradient.contiguous().index_select(0, token), None, None, None


class _Permute(torch.autograd.Function):
    """[T K] in the order of tokens to [T K] grouped by expert."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(place)
        return values.index_select(0, order)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        (place,) = context.saved_tensors
        return gradient.contiguous().index_select(0, place), None, None
