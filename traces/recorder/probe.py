"""One pass that is not recorded: what kind of model this is, and whether it can be recorded at all.

Everything that recording relies on is checked here on real calls, so that a model is refused by name before anything is
written, and never recorded wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from traces.errors import InputError
from traces.recorder.layers import MoELayer, expert_count, input_device
from traces.recorder.routers import Choice, RouterCall, RouterFacts, choose, ids_in, logits_in, selects

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 32
"""How much of the first prompt the probe runs."""


@dataclass(frozen=True)
class Findings:
    """What one pass showed of a model."""

    top_k: int
    """The largest k of all layers."""
    routers: list[RouterFacts] | None
    """Of every layer, where they were asked for."""
    kv_bytes_per_token: int | None


@dataclass
class _Seen:
    """The calls of one layer in one pass."""

    experts: list[tuple[Any, ...]] = field(default_factory=list)
    """Arguments of the experts."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """How often ids and weights had been written to when the experts were called."""
    beside: list[tuple[Any, RouterCall | None, Any]] = field(default_factory=list)
    """Other children of the block: module, call, output."""


def probe(
    model: torch.nn.Module,
    name: str,
    layers: Sequence[MoELayer],
    token_ids: Sequence[int],
    *,
    routers: bool,
    lookahead: bool,
) -> Findings:
    """Run the first tokens of a prompt through the model and check what the experts are given.

    With `routers`, also find each layer's router and check that it returns logits; with `lookahead`, that its selection can
    be reproduced from its gate input. `name` is what errors call the model.

    Raises `InputError`, naming layer and reason, for whatever cannot be recorded.
    """
    import torch

    tokens = list(token_ids)[:PROBE_TOKENS]
    order: list[int] = []
    seen = [_Seen() for _ in layers]
    with _watching(layers, seen, order), torch.no_grad():
        output = model(input_ids=torch.tensor([tokens], device=input_device(model)), use_cache=True)
    _check_calls(name, layers, seen, order)
    counts = [_check_routing(name, layer, calls, len(tokens)) for layer, calls in zip(layers, seen, strict=True)]
    facts = None
    if routers:
        with torch.no_grad():
            facts = [
                _router_facts(name, layer, calls, lookahead=lookahead) for layer, calls in zip(layers, seen, strict=True)
            ]
        if lookahead:
            # One rule for the whole model: a layer whose logits all happen to be positive proves nothing.
            by_logits = any(found.selects_by_logits for found in facts)
            facts = [RouterFacts(found.module, found.returns_probabilities, by_logits) for found in facts]
    return Findings(max(counts), facts, _kv_bytes_per_token(output, len(tokens)))


@contextmanager
def _watching(layers: Sequence[MoELayer], seen: Sequence[_Seen], order: list[int]) -> Iterator[None]:
    def on_experts(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            order.append(index)
            seen[index].experts.append(args)
            if len(args) >= 3:
                seen[index].versions.append((args[1]._version, args[2]._version))

        return hook

    def on_other(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            call = RouterCall(args[0], args[1:], keywords) if args else None
            seen[index].beside.append((module, call, output))

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.experts.register_forward_pre_hook(on_experts(index)))
        for child in layer.block.children():
            if child is not layer.experts:
                handles.append(child.register_forward_hook(on_other(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_calls(name: str, layers: Sequence[MoELayer], seen: Sequence[_Seen], order: Sequence[int]) -> None:
    for layer, calls in zip(layers, seen, strict=True):
        if len(calls.experts) != 1:
            often = "not called" if not calls.experts else f"called {len(calls.experts)} times"
            raise InputError(f"{name}: {layer.name} was {often} in one pass; each layer's experts must be called once")
    if list(order) != sorted(order):
        late = next(b for a, b in pairwise(order) if b < a)
        raise InputError(f"{name}: {layers[late].name} was called after a later layer; layers must be called in order")


def _check_routing(name: str, layer: MoELayer, calls: _Seen, tokens: int) -> int:
    """Check what the experts were given, and return the layer's k."""
    import torch

    args = calls.experts[0]
    if len(args) < 3 or not all(isinstance(found, torch.Tensor) for found in args[:3]):
        raise InputError(f"{name}: {layer.name} was not given (hidden, ids, weights); its routing cannot be observed")
    ids, weights = args[1:3]
    if ids.ndim != 2 or ids.shape != weights.shape or len(ids) != tokens or ids.is_floating_point():
        raise InputError(
            f"{name}: {layer.name} was given ids of shape {list(ids.shape)} and weights of shape {list(weights.shape)} for"
            f" {tokens} tokens; both must be [tokens, k]"
        )
    # transformers' own convention: the id after the last is no expert, and its weight is 0.
    experts = expert_count(layer.experts)
    if int(ids.min()) < 0 or int(ids.max()) > experts:
        raise InputError(f"{name}: {layer.name} was given the expert {int(ids.max())}; it has {experts}")
    if (ids._version, weights._version) != calls.versions[0]:
        raise InputError(f"{name}: {layer.name} writes over its routed ids or weights; they cannot be recorded")
    return int(ids.shape[1])


def _router_facts(name: str, layer: MoELayer, calls: _Seen, *, lookahead: bool) -> RouterFacts:
    import torch

    ids = calls.experts[0][1]
    experts = expert_count(layer.experts)
    module, call, logits = _router(name, layer, calls, ids, experts)
    sums = logits.float().sum(-1)
    probabilities = bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
    if not lookahead:
        return RouterFacts(module, probabilities, selects_by_logits=False)
    choice = choose(module, call, call.hidden, experts)
    if choice is None or not _reproduces(choice, ids, logits):
        raise InputError(
            f"{name}: the routing of {layer.name} is not the top {ids.shape[1]} of any score of its router"
            f" ({type(module).__name__}), so lookahead has no meaning; record with lookahead=0"
        )
    by_logits = torch.equal(choice.scores, choice.logits.float()) and bool((choice.scores < 0).any())
    return RouterFacts(module, probabilities, by_logits)


def _router(
    name: str, layer: MoELayer, calls: _Seen, ids: torch.Tensor, experts: int
) -> tuple[torch.nn.Module, RouterCall, torch.Tensor]:
    """Return the router, its call and its logits: the module that returned the routed ids, else the only one with logits."""
    import torch

    found = []
    for module, call, output in calls.beside:
        logits = logits_in(output, experts)
        if logits is None or call is None or len(logits) != len(ids):
            continue
        returned = ids_in(output)
        if returned is not None and returned.shape == ids.shape and torch.equal(returned, ids):
            return module, call, logits
        found.append((module, call, logits))
    if len(found) != 1:
        what = "no module" if not found else f"{len(found)} modules"
        raise InputError(
            f"{name}: {what} beside {layer.name} could be the router of its {experts} experts; record without router_logits"
            " and lookahead"
        )
    return found[0]


def _reproduces(choice: Choice, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    """Return whether asking the router again gives the routing of the pass, and its scores explain it."""
    import torch

    if not torch.equal(choice.logits, logits):
        return False
    if choice.ids is not None and not torch.equal(choice.ids, ids):
        return False
    return selects(choice.scores, ids)


def _kv_bytes_per_token(output: Any, tokens: int) -> int | None:
    """Return the bytes that one token adds to the cache, or None where the cache does not show its layers."""
    cache_layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if not cache_layers:
        return None
    total = 0
    for layer in cache_layers:
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            # A layer with a state of fixed size has no keys.
            if kept is not None and kept.ndim == 4 and kept.shape[2] == tokens:
                total += int(kept.nbytes) // tokens
    return total or None
