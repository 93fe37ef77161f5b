"""A router asked what it would choose: its own selection, and how it ranks the experts that it does not choose.

A router returns its k experts and no more, and what it ranks by is its own affair: logits, probabilities, sigmoid scores
with a bias, with some groups of experts excluded. It is found out by watching: the tensor over all experts of which the
router takes its top k is its *selection score*. A router that takes no top k itself, but leaves it to its caller or to
another search, is taken to select by its logits. Either is believed only if every routed expert of a real pass has at least
the score of every other expert; otherwise the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RouterCall:
    """What a router was called with: the gate input, and its own further arguments."""

    hidden: torch.Tensor
    """[T, H] or [B, S, H], as the model gave it."""
    extra: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Choice:
    """What a router makes of one gate input."""

    logits: torch.Tensor
    """[T, E]."""
    ids: torch.Tensor | None
    """[T, k], in no order; None where the router returns none."""
    scores: torch.Tensor
    """[T, E] float32, the selection scores."""


@dataclass(frozen=True)
class RouterFacts:
    """What the probe found out about one router."""

    module: torch.nn.Module
    returns_probabilities: bool
    """Whether what it returns as logits are probabilities already."""
    selects_by_logits: bool
    """Whether its selection scores are its logits, of which some are negative."""


def tensors_in(output: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of a module's output: itself, or the members of a tuple."""
    import torch

    for found in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(found, torch.Tensor):
            yield found


def logits_in(output: object, experts: int) -> torch.Tensor | None:
    """Return the logits in a router's output as [T, E]: its floating tensor whose last axis is all experts."""
    for found in tensors_in(output):
        if found.is_floating_point() and found.ndim >= 2 and found.shape[-1] == experts:
            return found.reshape(-1, experts)
    return None


def logarithm(probabilities: torch.Tensor) -> torch.Tensor:
    """Return logits that have these probabilities, finite where a probability has vanished."""
    import torch

    wide = probabilities.float()
    return wide.clamp(min=torch.finfo(torch.float32).tiny).log()


def ids_in(output: object) -> torch.Tensor | None:
    """Return the routed ids in a router's output as [T, k] int64: its tensor of whole numbers."""
    import torch

    for found in tensors_in(output):
        if found.dtype in (torch.int64, torch.int32) and found.ndim >= 2:
            return found.reshape(-1, found.shape[-1]).long()
    return None


def choose(router: torch.nn.Module, call: RouterCall, hidden: torch.Tensor, experts: int) -> Choice | None:
    """Ask `router` about `hidden`, with the further arguments of its own `call`; None where it returns no logits.

    `forward` is called directly, so that no hook fires. Only this call is watched, never one of the model's own.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        """Keeps what the last top-k over all experts was taken of."""

        ranked: torch.Tensor | None = None

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in (torch.topk, torch.Tensor.topk):
                ranked = args[0] if args else kwargs["input"]
                if ranked.shape[-1] == experts:
                    self.ranked = ranked
            return function(*args, **kwargs)

    with Watch() as watch:
        output = router.forward(hidden, *call.extra, **(call.keywords or {}))
    logits = logits_in(output, experts)
    if logits is None:
        return None
    scores = logits if watch.ranked is None else watch.ranked.reshape(-1, experts)
    return Choice(logits, ids_in(output), scores.float())


def selects(scores: torch.Tensor, ids: torch.Tensor) -> bool:
    """Return whether `ids` [T, k] are the experts of the highest `scores` [T, E], whichever way ties are broken."""
    chosen = scores.gather(1, ids)
    others = scores.scatter(1, ids, -float("inf"))
    return bool((chosen.min(-1).values >= others.max(-1).values).all())


def rank(
    scores: torch.Tensor, ids: torch.Tensor | None, ranks: int, *, are_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `ranks` best experts [T, M] (int64) and their probabilities [T, M] (float32).

    First come the experts `ids` [T, k] that the router chose, if it says which, then all others; both in descending
    selection score ([T, E] float32), equal scores by lower id. The probability is the softmax over all experts where the
    scores are logits. Other scores are divided by their sum over all experts, negative ones and excluded groups counted
    as 0.
    """
    import torch

    # Excluded groups have minus infinity, which must still rank above the marks below.
    scores = scores.clamp(min=torch.finfo(torch.float32).min / 2)
    positive = scores.clamp(min=0)
    if are_logits:
        probability = scores.softmax(-1)
    else:
        probability = positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if ids is not None:
        chosen = torch.zeros_like(scores).scatter_(1, ids, 1)
        order = order.gather(1, chosen.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    order = order[:, :ranks]
    return order, probability.gather(1, order)
