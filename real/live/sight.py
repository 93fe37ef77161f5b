"""What predictors see of a live model besides the routed ids: rankings of coming routers, logits, weights.

Routers are hooked for what they are given; what is to be seen of a layer is computed when `submit` is called, so that the
executor may have other work first, and written into host memory in words of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from real.device import Device
from real.live.model import LiveModel
from real.live.readout import Readout
from sim.fast.observed import Observed
from traces.errors import InputError
from traces.recorder.routers import Choice, RouterCall, choose, logarithm, logits_in, rank


class Sight:
    """Rows `observed` of the running pass, of at most `most_tokens`: what policies `need`, looking `depth` layers ahead.

    `turn` is the device's count of computed events (`Readout`). Raises InputError where what is needed cannot be observed.
    """

    def __init__(
        self,
        model: LiveModel,
        turn: torch.Tensor,
        device: Device,
        *,
        most_tokens: int,
        needs: frozenset[str],
        depth: int,
        kernels: bool,
    ) -> None:
        self.model, self.needs = model, needs
        self.layers, self.experts, self.top_k = len(model.layers), model.experts, model.top_k
        self.depth = depth if "lookahead" in needs else 0
        self.ranks = min(2 * self.top_k, self.experts)
        self._predicts, self._kernels = depth > 0, kernels
        per_token = 2 * self.depth * self.ranks + ("logits" in needs) * self.experts
        self._readout = Readout(most_tokens * per_token, turn, device, model.where, kernels=kernels)
        self._of = (0, 0)
        """Layer and tokens of the event that is or was published last."""
        self.observed = self._rows(most_tokens)
        """For predictors."""
        self._routers = None
        self._calls: list[RouterCall] = []
        if needs & {"lookahead", "logits"}:
            self._routers = model.probe(routers=True).routers
        self._router_inputs: dict[int, tuple[Any, Any]] = {}
        """By layer what its router was given and its logits, until its sight is submitted."""

    def observing(self) -> list[Any]:
        """Hook the routers where policies need more than ids and weights; return the hooks, to be removed by the caller."""
        if self._routers is None:
            return []
        if self.depth:
            self._calls = self._router_calls()
        return [
            facts.module.register_forward_hook(self._on_router(index), with_kwargs=True)
            for index, facts in enumerate(self._routers)
        ]

    def reaches(self, layer: int) -> bool:
        """Whether predictors see more of a layer than what it chose."""
        return self._predicts and ("logits" in self.needs or self._ahead(layer) > 0)

    def note_weights(self, layer: int, weights: Any) -> None:
        """Let predictors see the weights [n, K] of a layer."""
        self.observed.weights[: len(weights), layer] = weights

    def note_chosen(self, layer: int, ids: Any, request: int) -> None:
        """Let predictors see what a layer chose for the tokens of a request, `ids` [n, K]."""
        self.observed.experts[: len(ids), layer] = ids
        self.observed.request[: len(ids)] = request

    def expect(self, layer: int, event: int, count: int) -> None:
        """Say of which event, of `count` tokens, `submit` or a replay of what it recorded is to write."""
        self._of = layer, count
        sizes: dict[str, int] = {}
        if "logits" in self.needs:
            sizes["logits"] = count * self.experts
        for ahead in range(self._ahead(layer)):
            sizes |= {f"ranked {ahead}": count * self.ranks, f"scores {ahead}": count * self.ranks}
        self._readout.expect(event, sizes)

    def submit(self) -> None:
        """Submit the writing of all that is to be seen of that event's layer.

        Raises InputError where its router did not run before its experts, as it did when the model was probed.
        """
        layer, _ = self._of
        if not self.reaches(layer):
            return
        if layer not in self._router_inputs:
            raise InputError(
                f"{self.model.name}: the experts of {self.model.layers[layer].name} were called without its router, so "
                "nobody knows what predictors see"
            )
        routers = self._routers
        assert routers is not None  # something is to be seen of them
        given, logits = self._router_inputs.pop(layer)
        if "logits" in self.needs:
            assert logits is not None  # the probe saw them
            self._readout.publish("logits", logarithm(logits) if routers[layer].returns_probabilities else logits)
        for ahead in range(self._ahead(layer)):
            target = layer + ahead + 1
            choice = choose(routers[target].module, self._calls[target], given, self.experts)
            assert choice is not None
            self._publish_ranking(ahead, choice, are_logits=routers[0].selects_by_logits)

    def read(self) -> bool:
        """Write what came of that event into its rows; return False while it is not all in host memory."""
        seen, observed, (layer, count) = self._readout, self.observed, self._of
        if not seen.complete():
            return False
        for ahead in range(self._ahead(layer)):
            observed.lookahead_experts[:count, layer, ahead] = seen.whole(f"ranked {ahead}").reshape(count, -1)
            observed.lookahead_scores[:count, layer, ahead] = seen.fractions(f"scores {ahead}").reshape(count, -1)
        if "logits" in self.needs:
            observed.router_logits[:count, layer] = seen.fractions("logits").reshape(count, -1)
        return True

    def forget(self) -> None:
        """Let go of what a pass left behind."""
        self._router_inputs.clear()

    def _ahead(self, layer: int) -> int:
        return min(self.depth, self.layers - 1 - layer)

    def _rows(self, rows: int) -> Observed:
        layers, k, ranks, needs = self.layers, self.top_k, self.ranks, self.needs

        def numbers(needed: bool, *sizes: int, kind: Any = np.float32) -> Any:
            return np.full((rows if needed else 0, layers, *(sizes if needed else (0,) * len(sizes))), -1, kind)

        return Observed(
            experts=numbers(True, k, kind=np.int16),
            weights=numbers("weights" in needs, k),
            request=np.zeros(rows, np.int64),
            lookahead_experts=numbers(self.depth > 0, self.depth, ranks, kind=np.int16),
            lookahead_scores=numbers(self.depth > 0, self.depth, ranks),
            router_logits=numbers("logits" in needs, self.experts),
        )

    def _on_router(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if self.reaches(index):
                self._router_inputs[index] = args[0], logits_in(output, self.experts)

        return hook

    def _publish_ranking(self, ahead: int, choice: Choice, *, are_logits: bool) -> None:
        """Let the host know how a router ranks experts; shares are as precise as in a trace."""
        seen = self._readout
        if self._kernels and choice.ids is not None:
            from real import kernels

            words = seen.words(f"ranked {ahead}"), seen.words(f"scores {ahead}")
            scores, ids = choice.scores.contiguous(), choice.ids.contiguous()
            kernels.publish_ranking(scores, ids, seen.turn, words, self.ranks, are_logits=are_logits)
            return
        ids, shares = rank(choice.scores, choice.ids, self.ranks, are_logits=are_logits)
        seen.publish(f"ranked {ahead}", ids)
        seen.publish(f"scores {ahead}", shares.to(torch.float16))

    def _router_calls(self) -> list[RouterCall]:
        """Return what every router is called with besides the gate input. Raises InputError where that is the pass's own."""
        assert self._routers is not None
        calls: dict[int, RouterCall] = {}

        def keep(index: int) -> Callable[..., None]:
            return lambda module, args, keywords: calls.update({index: RouterCall(args[0], args[1:], keywords)})

        hooks = [
            facts.module.register_forward_pre_hook(keep(index), with_kwargs=True)
            for index, facts in enumerate(self._routers)
        ]
        try:
            with self.model.serving(lambda layer, hidden, ids, weights: torch.zeros_like(hidden)), torch.no_grad():
                self.model.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.model.where), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        lasting = {id(tensor) for tensor in [*self.model.model.parameters(), *self.model.model.buffers()]}
        for index, call in calls.items():
            for value in (*call.extra, *(call.keywords or {}).values()):
                if isinstance(value, torch.Tensor) and id(value) not in lasting:
                    raise InputError(
                        f"{self.model.name}: the router of {self.model.layers[index].name} is given values of the pass "
                        "itself, so it cannot be asked a layer before; choose a system without the cross-layer gate"
                    )
        return [calls[index] for index in range(self.layers)]
