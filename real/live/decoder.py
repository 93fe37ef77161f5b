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
from real.live.sight import Sight
from real.turn import Expected
from traces.errors import InputError


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
        self._kernels = self._use_kernels(where)
        turn = torch.zeros(1, dtype=torch.int32, device=where)
        self.readout = Readout(2 * most_tokens * self.top_k, turn, device, where, kernels=self._kernels)
        """What the host decides by: weights and ids."""
        self.sight = Sight(model, turn, device, most_tokens=most_tokens, needs=needs, depth=depth, kernels=self._kernels)
        self.words = self.readout.format
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
        self._held: list[tuple[Any, Any, Any]] = [(None, None, None)] * self.layers
        """By layer of the pass that ran or was captured last: hidden states [n, H], weights [n, K], outputs [n * K, H]."""
        self._listed, self._listed_event = 0, -1
        """Entries of the event that were listed for plain products, and which event that is."""
        if self._kernels:
            self._prepare_kernels(most_tokens)

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
        self.sight.forget()
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
            self.sight.note_weights(layer, self.readout.fractions("weights").reshape(self.count, -1))

    def publish_sight(self, step: int, layer: int) -> None:
        """Let the host know what predictors see; nobody waits for it before the link has its demands."""
        self.sight.note_chosen(layer, np.reshape(self._routed, (self.count, -1)), self.request)
        self.sight.expect(layer, self.event, self.count)
        if not self._segments:
            self.sight.submit()
        elif layer in self._sights:
            self._sights[layer].replay()

    def read_sight(self, step: int, layer: int) -> bool:
        """Write what came into the rows that predictors see; return False while it is not all there."""
        return self.sight.read()

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
