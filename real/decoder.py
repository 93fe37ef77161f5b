"""A minimal decoder of any shape with random weights, whose routing a trace forces: what a replay computes.

Attention with a static KV cache, norms, gate, shared and routed experts, head. Per layer it has two parts with the host's
decision between them: attention and gate, which end by writing the routed ids into host memory, and the experts, which read
their slots from host memory. On a GPU both parts are CUDA graphs for steps of at most `GRAPH_TOKENS` tokens. There is no
positional encoding: it would change neither bytes nor the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it

from real.device import COMPUTE, Device
from real.routing import ReplayInputs, Segment
from real.slab import slot_bytes_of
from real.turn import Expected, Words
from traces.errors import InputError

GRAPH_TOKENS = 4
"""Steps of up to so many tokens run as graphs on a GPU."""

ID_BITS = 11
"""A routed word is ``(step + 1) << ID_BITS | (expert + 1)``: one store says which expert, and that it is this step's."""

RING_ROWS = 1024
"""Rows of slot ids that the host may be ahead of the GPU: far more than one layer's."""


class ModelShape(NamedTuple):
    """Sizes of a decoder, in elements."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_width: int
    shared_width: int
    """Of all shared experts together; 0 for none."""
    heads: int
    vocabulary: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert: gate, up and down in bf16."""
        return 3 * self.hidden * self.expert_width * 2


class Weights:
    """Everything but the routed experts, in bf16 on `where`, drawn with `seed`."""

    def __init__(self, shape: ModelShape, where: str, seed: int = 0) -> None:
        random = torch.Generator(where).manual_seed(seed)

        def drawn(*sizes: int, scale: float | None = None) -> Any:
            scale = sizes[-1] ** -0.5 if scale is None else scale
            return torch.empty(*sizes, dtype=torch.bfloat16, device=where).normal_(0.0, scale, generator=random)

        hidden, layers = shape.hidden, range(shape.layers)
        self.embedding = drawn(shape.vocabulary, hidden, scale=1.0)
        self.head = drawn(shape.vocabulary, hidden)
        self.norm = torch.ones(hidden, dtype=torch.bfloat16, device=where)
        self.qkv = [drawn(3 * hidden, hidden) for _ in layers]
        self.output = [drawn(hidden, hidden) for _ in layers]
        self.router = [drawn(shape.experts, hidden) for _ in layers]
        self.shared_up = [drawn(2 * shape.shared_width, hidden) for _ in layers if shape.shared_width]
        self.shared_down = [drawn(hidden, shape.shared_width) for _ in layers if shape.shared_width]


class SlotPool:
    """Device memory for `slots` experts, `bytes` [slots, slot_bytes], and the matrices of each slot as strided views."""

    def __init__(self, shape: ModelShape, slots: int, where: str) -> None:
        self.slot_bytes = slot_bytes_of(shape.expert_bytes)
        hidden, width, stride = shape.hidden, shape.expert_width, self.slot_bytes // 2
        self.bytes = torch.zeros(slots, self.slot_bytes, dtype=torch.uint8, device=where)
        self.elements = self.bytes.view(torch.bfloat16)
        self.gate_up = self.elements.as_strided((slots, 2 * width, hidden), (stride, hidden, 1))
        self.down = self.elements.as_strided((slots, hidden, width), (stride, width, 1), 2 * width * hidden)
        self.address: int = self.bytes.data_ptr()


class ReplayDecoder:
    """Decoder of `shape` for the steps of `inputs`, whose experts lie in `pool`; a `real.executor.Decoder`."""

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        inputs: ReplayInputs,
        pool: SlotPool,
        device: Device,
        where: str,
        seed: int = 0,
    ) -> None:
        self.shape, self.weights, self.inputs, self.pool, self.device = shape, weights, inputs, pool, device
        self._pin = where != "cpu"
        self._kernels = self._use_kernels(where)
        steps, most = inputs.positions.shape
        entries = most * shape.top_k
        if max(shape.experts, 1) >= 1 << ID_BITS or steps >= 1 << (31 - ID_BITS):
            raise InputError(
                f"{shape.experts} experts in {steps} steps: at most {(1 << ID_BITS) - 1} and {(1 << 31 - ID_BITS) - 1} fit"
            )

        def on_device(array: Any, dtype: Any) -> Any:
            return torch.as_tensor(array, dtype=dtype).to(where)

        def zeros(*sizes: int, dtype: Any = torch.bfloat16) -> Any:
            return torch.zeros(*sizes, dtype=dtype, device=where)

        random = torch.Generator().manual_seed(seed)
        self._token_ids = on_device(torch.randint(shape.vocabulary, (steps, most), generator=random), torch.int64)
        self._positions = on_device(inputs.positions, torch.int64)
        self._lanes = on_device(inputs.lanes, torch.int64)
        self._forced = on_device(inputs.forced, torch.int32)
        self._step = zeros(1, dtype=torch.int64) - 1
        self._position = zeros(most, dtype=torch.int64)
        self._lane = zeros(most, dtype=torch.int64)
        self._x = zeros(most, shape.hidden)
        self._h = zeros(most, shape.hidden)
        self._gate = zeros(most, shape.top_k, dtype=torch.float32)
        self._y = zeros(entries, shape.hidden, dtype=torch.float32)
        size = shape.hidden // shape.heads
        cache = (shape.layers, inputs.lane_count, shape.heads, inputs.context, size)
        self._keys, self._values = zeros(*cache), zeros(*cache)
        self._places = torch.arange(inputs.context, device=where)
        self._spread = on_device(torch.randint(1, 1 << 40, (most, shape.hidden), generator=random), torch.int64)
        self.chosen = zeros(steps, most, dtype=torch.int64)
        """[S, N] the token that the head likes best."""
        self.checksums = zeros(steps, dtype=torch.int64)
        """[S] a sum over all bits of the step's last hidden states: equal only for equal outputs."""

        self._words_tensor = self._shared(shape.layers, entries)
        self.words = Words(self._words_tensor.numpy().reshape(-1), ID_BITS, 1)
        self._entries = entries
        self._routed: list[int] = []
        """Ids of the running event, token by token."""
        self._count = 0
        """Tokens of the running step."""
        self._graphs: dict[tuple[str, int, int], Any] = {}
        if self._kernels:
            width = min(most, GRAPH_TOKENS) * shape.top_k
            self._ring_tensor = self._shared(RING_ROWS, width)
            self._ring = self._ring_tensor.numpy()
            self._turn = zeros(1, dtype=torch.int32)
            self._turns = 0
            self._slots = zeros(width, dtype=torch.int32) - 1
            self._activation = zeros(width, shape.expert_width, dtype=torch.float32)
            self._list_tensor = self._shared(1, entries)
            self._list = self._list_tensor.numpy()[0]
            self._listed = 0
            self._list_on_device = zeros(entries, dtype=torch.int64)

    def capture(self) -> None:
        """Record the graphs of all step sizes that run as graphs; does nothing on a CPU."""
        if not self._kernels:
            return
        memory = torch.cuda.graph_pool_handle()
        for count in self._graph_sizes():
            parts = self._parts(count)
            self._step.fill_(-1)
            for part in parts.values():  # kernels compile and libraries settle before anything is recorded
                part()
            torch.cuda.synchronize()
            for place, part in parts.items():
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=memory)
                part()
                graph.capture_end()
                self._graphs[place] = graph
        torch.cuda.synchronize()
        self._reset()

    # ---- what the executor calls -----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Submit the embedding."""
        self._count = count = self.inputs.tokens[step]
        self._graphed = self._kernels and self._is_graphed(step)
        self._submit("begin", 0, lambda: self._embed(count))

    def route(self, step: int, layer: int) -> None:
        """Submit attention and gate of a layer."""
        count, segments = self._count, self.inputs.segments[step]
        if self._kernels:
            self._listed = 0
        self._submit("route", layer, lambda: self._attend(layer, count, segments))

    def shared(self, step: int, layer: int) -> None:
        """Submit the shared experts, if there are any: the host decides meanwhile."""
        if self.shape.shared_width:
            count = self._count
            self._submit("share", layer, lambda: self._share(layer, count))

    def expected(self, step: int, layer: int) -> Expected:
        """Say which words hold the routed ids of a layer: those of all tokens."""
        count = self._count * self.shape.top_k
        return Expected(layer * self._entries, count, count, step + 1)

    def routed(self, step: int, layer: int, ids: list[int]) -> None:
        """Take note of the routed ids."""
        self._routed = ids

    def publish_sight(self, step: int, layer: int) -> None:
        """Do nothing: predictors see what was recorded."""

    def read_sight(self, step: int, layer: int) -> bool:
        """Say that it is there."""
        return True

    def compute(self, step: int, layer: int, slots: Mapping[int, int]) -> None:
        """Submit the experts that `slots` names, by key."""
        first_key = layer * self.shape.experts
        if self._graphed:
            row = [slots.get(first_key + expert, -1) if expert >= 0 else -1 for expert in self._routed]
            self._ring[self._turns % RING_ROWS, : len(row)] = row
            self._turns += 1
            self._graphs["experts", 0, self._count].replay()
            return
        groups = [
            (slot, [place for place, expert in enumerate(self._routed) if first_key + expert == key])
            for key, slot in slots.items()
        ]
        if groups:
            self.device.submit(COMPUTE, self._plain_experts(groups))

    def end_step(self, step: int) -> None:
        """Submit last norm, head and the choice of a token."""
        count = self._count
        self._submit("end", 0, lambda: self._finish(count))

    # ---- the parts -------------------------------------------------------------------------------------------

    def _submit(self, name: str, layer: int, part: Callable[[], None]) -> None:
        """Submit a part: its graph if the step runs as graphs."""
        if self._graphed:
            self._graphs[name, layer, self._count].replay()
        else:
            self.device.submit(COMPUTE, part)

    def _graph_sizes(self) -> list[int]:
        """Return the tokens of the steps that run as graphs."""
        return sorted({count for step, count in enumerate(self.inputs.tokens) if self._is_graphed(step)})

    def _parts(self, count: int) -> dict[tuple[str, int, int], Callable[[], None]]:
        """Return all parts of a step of `count` tokens by (name, layer, tokens), in an order in which they can run."""
        return {
            ("begin", 0, count): lambda: self._embed(count),
            **{("route", layer, count): partial(self._attend, layer, count, None) for layer in range(self.shape.layers)},
            **{("share", layer, count): partial(self._share, layer, count) for layer in range(len(self.weights.shared_up))},
            ("experts", 0, count): lambda: self._experts_in_slots(count),
            ("end", 0, count): lambda: self._finish(count),
        }

    def _embed(self, count: int) -> None:
        self._step += 1
        self._position[:count] = self._positions.index_select(0, self._step)[0, :count]
        self._lane[:count] = self._lanes.index_select(0, self._step)[0, :count]
        self._x[:count] = self.weights.embedding[self._token_ids.index_select(0, self._step)[0, :count]]

    def _attend(self, layer: int, count: int, segments: list[Segment] | None) -> None:
        """Add the experts of the layer before, attend, route; `segments` must be there if a request has several tokens."""
        weights, shape = self.weights, self.shape
        if layer:
            self._add_experts(count)
        x, h = self._x[:count], self._h[:count]
        size = shape.hidden // shape.heads
        normed = F.rms_norm(x, (shape.hidden,), weights.norm)
        q, k, v = (normed @ weights.qkv[layer].T).view(count, 3, shape.heads, size).unbind(1)
        position, lane = self._position[:count], self._lane[:count]
        keys, values = self._keys[layer], self._values[layer]
        keys[lane, :, position] = k
        values[lane, :, position] = v
        if segments is None or len(segments) == count:
            mixed = self._attend_one_each(q, keys, values, lane, position)
        else:
            mixed = torch.cat([self._attend_segment(q, keys, values, position, segment) for segment in segments])
        x += mixed.reshape(count, shape.hidden) @ weights.output[layer].T
        h.copy_(F.rms_norm(x, (shape.hidden,), weights.norm))
        self._route(layer, h @ weights.router[layer].T)

    def _share(self, layer: int, count: int) -> None:
        """Add the shared experts, whose weights are one expert's."""
        gate, up = (self._h[:count] @ self.weights.shared_up[layer].T).chunk(2, -1)
        self._x[:count] += (F.silu(gate) * up) @ self.weights.shared_down[layer].T

    def _attend_one_each(self, q: Any, keys: Any, values: Any, lane: Any, position: Any) -> Any:
        """Attend for one token of each request: [n, heads, size]."""
        if len(keys) > 1:
            keys, values = keys.index_select(0, lane), values.index_select(0, lane)
        scores = (q.unsqueeze(2) @ keys.transpose(2, 3)).squeeze(2).float() * q.shape[-1] ** -0.5
        hidden = self._places[None, None, :] > position[:, None, None]
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
        return (shares.unsqueeze(2) @ values).squeeze(2)

    def _attend_segment(self, q: Any, keys: Any, values: Any, position: Any, segment: Segment) -> Any:
        """Attend for several tokens of one request: [m, heads, size]."""
        start, stop, lane, context = segment
        seen = self._places[None, :context] <= position[start:stop, None]
        mixed = F.scaled_dot_product_attention(
            q[start:stop].transpose(0, 1), keys[lane, :, :context], values[lane, :, :context], attn_mask=seen
        )
        return mixed.transpose(0, 1)

    def _route(self, layer: int, logits: Any) -> None:
        """Write what the trace says into host memory, and the gate's weights of it."""
        count = len(logits)
        words = self._words_tensor[layer, : count * self.shape.top_k]
        if self._kernels:
            from real import kernels

            kernels.route(logits, self._forced[layer], self._step, self._gate, words, self.shape.top_k)
            return
        ids = self._forced[layer].index_select(0, self._step)[0, :count].to(torch.int64)
        shares = logits.float().softmax(-1)
        self._gate[:count] = shares.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
        words.copy_((((self._step + 1) << ID_BITS) | (ids.reshape(-1) + 1)).to(torch.int32))

    def _add_experts(self, count: int) -> None:
        """Add the routed experts' outputs, all at once and in one order, however they were computed."""
        y = self._y[: count * self.shape.top_k].view(count, self.shape.top_k, self.shape.hidden)
        self._x[:count] += (y * self._gate[:count, :, None]).sum(1).to(self._x.dtype)

    def _experts_in_slots(self, count: int) -> None:
        """Compute the experts whose slots stand in the next row of the ring."""
        from real import kernels

        entries = count * self.shape.top_k
        kernels.take_row(self._ring_tensor, self._turn, self._slots)
        kernels.experts_by_slot(
            self._h[:count], self.pool.elements, self._slots, self._activation[:entries], self._y[:entries], self.shape.top_k
        )

    def _plain_experts(self, groups: list[tuple[int, list[int]]]) -> Callable[[], None]:
        """Return the work of computing some experts with plain matrix products: (slot, entries) each."""
        places = [place for _, entries in groups for place in entries]
        if self._kernels:
            from real import kernels

            start, self._listed = self._listed, self._listed + len(places)
            self._list[start : self._listed] = places
            chosen = self._list_on_device[start : self._listed]
            kernels.take_list(self._list_tensor[0, start:], chosen, len(places))
        else:
            chosen = torch.tensor(places)

        def work() -> None:
            start = 0
            for slot, entries in groups:
                mine = chosen[start : start + len(entries)]
                start += len(entries)
                x = self._h[mine // self.shape.top_k]
                gate, up = (x @ self.pool.gate_up[slot].T).chunk(2, -1)
                self._y[mine] = ((F.silu(gate) * up) @ self.pool.down[slot].T).float()

        return work

    def _finish(self, count: int) -> None:
        self._add_experts(count)
        x = self._x[:count]
        logits = F.rms_norm(x, (self.shape.hidden,), self.weights.norm) @ self.weights.head.T
        self.chosen[:, :count].index_copy_(0, self._step, logits.argmax(-1)[None])
        bits = x.view(torch.int16).to(torch.int64)
        self.checksums.index_copy_(0, self._step, (bits * self._spread[:count]).sum()[None])

    def _is_graphed(self, step: int) -> bool:
        """Whether a step is small and has one token of each request."""
        return self.inputs.tokens[step] <= GRAPH_TOKENS and len(self.inputs.segments[step]) == self.inputs.tokens[step]

    def _reset(self) -> None:
        """Forget what trying the parts out has left."""
        self._step.fill_(-1)
        self._turn.zero_()
        self._words_tensor.zero_()
        for used in (self._keys, self._values, self._y, self._gate, self.chosen, self.checksums):
            used.zero_()

    @staticmethod
    def _use_kernels(where: str) -> bool:
        """Whether small steps run as graphs of Triton kernels: on a GPU."""
        return where != "cpu"

    def _shared(self, *sizes: int) -> Any:
        """Return zeros (int32) in host memory that kernels can read and write too; small, so rounding up does not matter."""
        return torch.zeros(*sizes, dtype=torch.int32, pin_memory=self._pin)
