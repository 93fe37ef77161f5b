"""The experts of a transformers model, computed by slot inside the model's own forward: a `real.executor.Decoder`.

The model calls its experts; `enter` takes what the router chose, the executor decides and calls `compute`, `leave` returns
the sum. Outputs are kept per (token, rank) and summed once, in one order, so that neither residency nor waves change a bit.
Passes of few tokens on a GPU run on kernels that read slots from host memory; others on plain products, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from real.decoder import GRAPH_TOKENS, RING_ROWS
from real.device import COMPUTE, Device, Memory
from real.live.model import LiveModel
from real.live.readout import Readout
from real.turn import Expected
from sim.fast.observed import Observed
from traces.errors import InputError
from traces.recorder.routers import Choice, RouterCall, choose, logarithm, logits_in, rank


class LiveDecoder:
    """Computes experts of `model` out of `slots`; policies see what they `need`, looking `depth` layers ahead.

    `most_tokens` is the longest pass. Raises InputError where what is needed cannot be observed.
    """

    def __init__(
        self, model: LiveModel, slots: int, device: Device, *, most_tokens: int, needs: frozenset[str], depth: int
    ) -> None:
        self.model, self.layout, self.device, self.needs = model, model.layout, device, needs
        self.layers, self.experts, self.top_k = len(model.layers), model.experts, model.top_k
        self.modules: list[Any] = [layer.experts for layer in model.layers]
        where = model.where
        self.slots = torch.zeros(slots, self.layout.slot_bytes, dtype=torch.uint8, device=where)
        """[slots, slot_bytes] experts on the device."""
        self._elements = self.slots.view(self.layout.dtype)
        self._tensors = self.layout.views(self.slots)
        self._first, self._second = (name for name in self.layout.names if not name.endswith("_bias"))
        self._input, self._output = (
            self.layout.shapes[self.layout.names.index(name)] for name in (self._first, self._second)
        )
        if self.modules[0].is_transposed:
            self._wide, self._size = self._input[::-1]
            self._size_out, width = self._output[::-1]
        else:
            self._wide, self._size = self._input
            self._size_out, width = self._output
        self._width = width
        self.depth = depth if "lookahead" in needs else 0
        self._predicts = depth > 0
        self.ranks = min(2 * self.top_k, self.experts)
        self._kernels = self._use_kernels(where)
        turn = torch.zeros(1, dtype=torch.int32, device=where)
        self.readout = Readout(2 * most_tokens * self.top_k, turn, device, where, kernels=self._kernels)
        """What the host decides by: weights and ids."""
        per_token = 2 * self.depth * self.ranks + ("logits" in needs) * self.experts
        self._sight = Readout(most_tokens * per_token, turn, device, where, kernels=self._kernels)
        """What predictors see besides, of the event whose `publish_sight` was the last."""
        self._sight_of = (0, 0)
        """That event's layer and tokens."""
        self.words = self.readout.format
        self.observed = self._observed(most_tokens)
        """Rows of the running pass, for predictors."""
        self._routers = None
        self._calls: list[RouterCall] = []
        if needs & {"lookahead", "logits"}:
            self._routers = model.probe(routers=True).routers
        self.event = 0
        """The running event, counted from the first that was computed."""
        self.request = 0
        """Whose tokens are running."""
        self._segments: Sequence[Any] = ()
        """While a captured pass is replayed: what runs before each layer's experts, and after the last."""
        self._sights: Mapping[int, Any] = {}
        """While one is: by layer what publishes what predictors see of it, where there is such."""
        self.count = 0
        self._routed: list[int] = []
        self._small = False
        self._router_inputs: dict[int, tuple[Any, Any]] = {}
        """By layer what its router was given and its logits, until its sight is submitted."""
        self._held: list[tuple[Any, Any, Any]] = [(None, None, None)] * self.layers
        """By layer of the pass that ran or was captured last: hidden states [n, H], weights [n, K], outputs [n * K, H]."""
        self._listed, self._listed_event = 0, -1
        """Entries of the event that were listed for plain products, and which event that is."""
        if self._kernels:
            self._prepare_kernels(most_tokens)

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

    @property
    def memory(self) -> Memory:
        """Where slots and experts are."""
        return Memory(int(self.slots.data_ptr()), self.model.slab.address, self.layout.slot_bytes)

    # ---- what the model calls --------------------------------------------------------------------------------

    def enter(self, layer: int, hidden: Any, ids: Any, weights: Any) -> None:
        """Take what the router of a layer chose, and let the host know. Raises InputError where its k is not the model's."""
        k = self.top_k
        if ids.shape[1] != k:
            raise InputError(
                f"{self.model.name}: {self.model.layers[layer].name} gets {ids.shape[1]} experts a token, another layer {k}"
            )
        hidden = hidden.reshape(-1, hidden.shape[-1])
        count = len(hidden)
        self._begin_event(layer, count)
        if self._small:
            from real import kernels

            entries = count * k
            h, w = self._held_hidden[:count], self._held_weights[:entries].view(count, k)
            self._held[layer] = h, w, self._held_y[:entries]
            kernels.enter(
                hidden.contiguous(),
                ids.contiguous(),
                weights.contiguous(),
                self.readout.turn,
                self.readout.words("ids"),
                self.readout.words("weights") if "weights" in self.needs else None,
                (h, w),
                self.experts,
            )
            return
        absent = (ids >= self.experts) | (ids < 0)
        order = weights.float().masked_fill(absent, -float("inf")).argsort(dim=-1, descending=True, stable=True)
        ordered = weights.float().masked_fill(absent, 0.0).gather(1, order)
        self._held[layer] = hidden, ordered, torch.zeros(count * k, self._size_out, device=hidden.device)
        if "weights" in self.needs:
            self.readout.publish("weights", ordered)
        self.readout.publish("ids", ids.masked_fill(absent, -1).gather(1, order))

    def leave(self, layer: int, hidden: Any) -> Any:
        """Return the weighted sum of the experts' outputs, in shape and type of the hidden states."""
        _, weights, y = self._held[layer]
        output = torch.empty(len(weights), self._size_out, dtype=hidden.dtype, device=hidden.device)
        turn = self.readout.turn
        if self._small:
            from real import kernels

            kernels.combine(y, weights, output, turn)
        else:

            def combine() -> None:
                parts = y.view(*weights.shape, -1) * weights[..., None]
                output.copy_(parts.masked_fill(weights[..., None] == 0, 0.0).sum(1))
                turn.add_(1)

            self.device.submit(COMPUTE, combine)
            self.device.settle()
        self.event += 1
        return output.view(*hidden.shape[:-1], self._size_out)

    def held(self) -> Sequence[Any]:
        """Return what a captured pass reads and writes, for `replay`."""
        return self._held

    def replay(self, segments: Sequence[Any], sights: Mapping[int, Any], held: Sequence[Any]) -> None:
        """Let `route`, `publish_sight` and `end_step` replay a captured pass from now on; with no segments, no more."""
        self._segments, self._sights = segments, sights
        self._held = list(held) or [(None, None, None)] * self.layers

    def forget(self) -> None:
        """Let go of what a pass left behind."""
        self._router_inputs.clear()
        self._held = [(None, None, None)] * self.layers

    # ---- what the executor calls -----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Nothing: the model's forward runs."""

    def route(self, step: int, layer: int) -> None:
        """Replay what comes before the experts of a layer, in a captured pass of one token."""
        if layer:
            self.event += 1
        self._begin_event(layer, 1)
        self._segments[layer].replay()

    def shared(self, step: int, layer: int) -> None:
        """Leave shared experts to the model, whose forward has them where it likes."""

    def expected(self, step: int, layer: int) -> Expected:
        """Say which words come, the routed ids last."""
        return self.readout.expected(self.count * self.top_k)

    def routed(self, step: int, layer: int, ids: list[int]) -> None:
        """Take note of the routed ids, token by token in descending weight."""
        self._routed = ids
        if "weights" in self.needs:
            count = self.count
            self.observed.weights[:count, layer] = self.readout.fractions("weights").reshape(count, -1)

    def publish_sight(self, step: int, layer: int) -> None:
        """Let the host know what predictors see; nobody waits for it before the link has its demands."""
        self.observed.experts[: self.count, layer] = np.reshape(self._routed, (self.count, -1))
        if not self._segments:
            self.submit_sight(layer)
            return
        self._expect_sight(layer)
        if layer in self._sights:
            self._sights[layer].replay()

    def read_sight(self, step: int, layer: int) -> bool:
        """Write what came into the rows that predictors see; return False while it is not all there."""
        if not self._sight.complete():
            return False
        self._note_sight()
        return True

    def compute(self, step: int, layer: int, slots: Mapping[int, int]) -> None:
        """Submit the experts that `slots` names, by key."""
        first_key = layer * self.experts
        if self._small:
            row = [slots.get(first_key + expert, -1) if expert >= 0 else -1 for expert in self._routed]
            self._ring[self._rows % RING_ROWS, : len(row)] = row
            self._rows += 1
            self._part(layer, self.count).replay()
            return
        groups = [
            (slot, [place for place, expert in enumerate(self._routed) if first_key + expert == key])
            for key, slot in slots.items()
        ]
        if groups:
            self.device.submit(COMPUTE, self._plain_experts(layer, groups))

    def end_step(self, step: int) -> None:
        """Replay what comes after the last layer, in a captured pass."""
        if self._segments:
            self.event += 1
            self._segments[-1].replay()

    # ---- events ----------------------------------------------------------------------------------------------

    def _begin_event(self, layer: int, count: int) -> None:
        """Say what the host will be told of the event."""
        self.count = count
        self._small = self._kernels and count <= GRAPH_TOKENS
        names = ("weights", "ids") if "weights" in self.needs else ("ids",)
        self.readout.expect(self.event, dict.fromkeys(names, count * self.top_k))

    def _observed(self, rows: int) -> Observed:
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

    def _expect_sight(self, layer: int) -> None:
        self._sight_of = layer, self.count
        count = self.count
        sizes: dict[str, int] = {}
        if "logits" in self.needs:
            sizes["logits"] = count * self.experts
        for ahead in range(min(self.depth, self.layers - 1 - layer)):
            sizes |= {f"ranked {ahead}": count * self.ranks, f"scores {ahead}": count * self.ranks}
        self._sight.expect(self.event, sizes)

    def _note_sight(self) -> None:
        (layer, count), seen, observed = self._sight_of, self._sight, self.observed
        observed.request[:count] = self.request
        for ahead in range(min(self.depth, self.layers - 1 - layer)):
            observed.lookahead_experts[:count, layer, ahead] = seen.whole(f"ranked {ahead}").reshape(count, -1)
            observed.lookahead_scores[:count, layer, ahead] = seen.fractions(f"scores {ahead}").reshape(count, -1)
        if "logits" in self.needs:
            observed.router_logits[:count, layer] = seen.fractions("logits").reshape(count, -1)

    # ---- routers ---------------------------------------------------------------------------------------------

    def _on_router(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if self.has_sight(index):
                self._router_inputs[index] = args[0], logits_in(output, self.experts)

        return hook

    def has_sight(self, layer: int) -> bool:
        """Whether predictors see more of a layer than what it chose."""
        return self._predicts and ("logits" in self.needs or min(self.depth, self.layers - 1 - layer) > 0)

    def submit_sight(self, layer: int) -> None:
        """Submit all that predictors see of the layer that was entered last, besides what it chose.

        Raises InputError where its router did not run before its experts, as it did when the model was probed.
        """
        self._expect_sight(layer)
        if not self.has_sight(layer):
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
            self._sight.publish("logits", logarithm(logits) if routers[layer].returns_probabilities else logits)
        for ahead in range(min(self.depth, self.layers - 1 - layer)):
            target = layer + ahead + 1
            choice = choose(routers[target].module, self._calls[target], given, self.experts)
            assert choice is not None
            self._publish_ranking(ahead, choice, are_logits=routers[0].selects_by_logits)

    def _publish_ranking(self, ahead: int, choice: Choice, *, are_logits: bool) -> None:
        """Let the host know how a router ranks experts; shares are as precise as in a trace."""
        seen = self._sight
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

    # ---- plain products --------------------------------------------------------------------------------------

    def _plain_experts(self, layer: int, groups: list[tuple[int, list[int]]]) -> Callable[[], None]:
        """Return the work of computing some experts with plain matrix products: (slot, entries) each."""
        places = [place for _, entries in groups for place in entries]
        if self._kernels:
            from real import kernels

            start = 0 if self.event != self._listed_event else self._listed
            self._listed_event, self._listed = self.event, start + len(places)
            self._list[start : self._listed] = places
            chosen = self._list_on_device[start : self._listed]
            kernels.take_list(self._list_tensor[start:], chosen, len(places))
        else:
            chosen = torch.tensor(places)
        (hidden, _, y), k, module = self._held[layer], self.top_k, self.modules[layer]

        def work() -> None:
            start = 0
            for slot, entries in groups:
                mine = chosen[start : start + len(entries)]
                start += len(entries)
                wide = self._linear(hidden[mine // k], self._first, slot)
                y[mine] = self._linear(_activate(module, wide), self._second, slot).float()

        return work

    def _linear(self, x: Any, name: str, slot: int) -> Any:
        matrix = self._tensors[name][slot]
        output = x @ (matrix if self.modules[0].is_transposed else matrix.T)
        return output + self._tensors[f"{name}_bias"][slot] if self.modules[0].has_bias else output

    # ---- kernels ---------------------------------------------------------------------------------------------

    @staticmethod
    def _use_kernels(where: str) -> bool:
        """Whether small passes run on Triton kernels: on a GPU."""
        return where != "cpu"

    def _prepare_kernels(self, most_tokens: int) -> None:
        where, dtype, k = self.model.where, self.layout.dtype, self.top_k
        entries = GRAPH_TOKENS * k

        def zeros(*sizes: int, dtype: Any) -> Any:
            return torch.zeros(*sizes, dtype=dtype, device=where)

        def shared(*sizes: int) -> Any:
            return torch.zeros(*sizes, dtype=torch.int32, pin_memory=where != "cpu")

        self._held_hidden = zeros(GRAPH_TOKENS, self._size, dtype=dtype)
        self._held_weights = zeros(entries, dtype=torch.float32)
        self._held_y = zeros(entries, self._size_out, dtype=torch.float32)
        self._held_wide = zeros(entries, self._wide, dtype=dtype)
        self._activation = zeros(entries, self._width, dtype=torch.float32)
        self._ring_tensor = shared(RING_ROWS, entries)
        self._ring = self._ring_tensor.numpy()
        self._rows = 0
        self._row_turn = zeros(1, dtype=torch.int32)
        self._slot_row = zeros(entries, dtype=torch.int32) - 1
        self._list_tensor = shared(most_tokens * k)
        self._list = self._list_tensor.numpy()
        self._list_on_device = zeros(most_tokens * k, dtype=torch.int64)
        self._parts: dict[tuple[int, int], Any] = {}
        self._fused = is_plain_silu(self.modules[0]) and self.layout.offsets[1] == 2 * self._width * self._size

    def capture_experts(self, count: int = 1) -> None:
        """Record the graphs of the experts for passes of `count` tokens; does nothing on a CPU."""
        if not self._kernels:
            return
        for layer in range(1 if self._fused else self.layers):
            self._parts[layer, count] = self._graph(lambda layer=layer: self._experts_in_slots(layer, count))  # type: ignore[misc]
        self._row_turn.zero_()
        self._rows = 0

    def _part(self, layer: int, count: int) -> Any:
        place = (0 if self._fused else layer, count)
        if place not in self._parts:
            self._parts[place] = _Direct(lambda: self._experts_in_slots(layer, count))
        return self._parts[place]

    def _graph(self, part: Callable[[], None]) -> Any:
        """Return `part` as a CUDA graph."""
        part()  # kernels compile before anything is recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        part()
        graph.capture_end()
        return graph

    def _experts_in_slots(self, layer: int, count: int) -> None:
        """Compute the experts whose slots stand in the next row of the ring."""
        from real import kernels

        entries, k, module, layout = count * self.top_k, self.top_k, self.modules[layer], self.layout
        kernels.take_row(self._ring_tensor, self._row_turn, self._slot_row)
        hidden, slots, y = self._held_hidden[:count], self._slot_row[:entries], self._held_y[:entries]
        if self._fused:
            kernels.experts_by_slot(hidden, self._elements, slots, self._activation[:entries], y, k)
            return
        offset = dict(zip(layout.names, layout.offsets, strict=True))
        transposed = module.is_transposed
        wide = self._held_wide[:entries]
        first, second = (
            {"offset": offset[name], "bias": offset.get(f"{name}_bias", -1)} for name in (self._first, self._second)
        )
        kernels.project(hidden, self._elements, slots, wide, **first, transposed=transposed, top_k=k)
        narrow = _activate(module, wide)
        kernels.project(narrow.contiguous(), self._elements, slots, y, **second, transposed=transposed, top_k=1)


class _Direct:
    """A part that was not recorded."""

    def __init__(self, part: Callable[[], None]) -> None:
        self.replay = part


def _activate(module: Any, wide: Any) -> Any:
    """Apply the model's own gate or activation."""
    return module._apply_gate(wide) if module.has_gate else module.act_fn(wide)


def is_plain_silu(module: Any) -> bool:
    """Whether an expert is ``down(silu(gate) * up)`` with gate and up one after the other, and nothing else."""
    from transformers.integrations import moe

    return (
        module.has_gate
        and module.is_concatenated
        and not module.has_bias
        and not module.is_transposed
        and type(module)._apply_gate is moe._default_apply_gate
        and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )
