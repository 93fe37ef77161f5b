"""What everything costs: the only place where a machine and a model meet.

Formulas in words and the constants of every profile: `docs/hardware.md`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from policies.contract import Ints
from sim.hardware import Curve, Hardware
from traces.errors import InputError, nearest
from traces.trace import ModelSpec

NS = 10**9
"""Nanoseconds in a second."""

NO_READOUT = -1
"""The host issues the next step without having read the outcome of this one."""


class Costs(NamedTuple):
    """Integer nanoseconds of everything that the engines need. S steps."""

    host_gate_ns: int
    """The host issues attention and gate of one layer."""
    host_experts_ns: int
    """The host decides and issues the experts of one layer."""
    host_step_ns: int
    """Host work once per step."""
    readout_ns: int
    """From the end of a gate on the device until the host knows the routed experts."""
    step_ns: Ints
    """[S] compute once per step (embedding, head, sampling)."""
    attention_ns: Ints
    """[S] compute of one layer's attention, gate and shared experts."""
    expert_ns: Ints
    """[most tokens of a step + 1] compute of one routed expert for n tokens; 0 for none."""
    chunks: int
    """An expert crosses the link in this many copies."""
    chunk_ns: int
    """Link time of every chunk but the last."""
    last_chunk_ns: int
    """Link time of the last chunk."""
    expert_bytes: int
    """Bytes of one expert."""
    chunk_bytes: int
    """Bytes of every chunk but the last."""
    link_start_ns: int = 0
    """By how much longer the first chunk takes on a link that was idle."""
    step_readout_ns: int = NO_READOUT
    """From the end of a step on the device until the host goes on; `NO_READOUT` where it does not wait for that end."""
    group_ns: int = 0
    """Compute once per group of experts: those that were there are one group, each that lands later is one."""
    demand_ns: tuple[int, ...] = ()
    """[chunks + 1] link time of the last n chunks of an expert as a demand, in one copy; empty: chunk by chunk."""
    committed_chunks: int = 0
    """Chunks that a prefetch moves before it gives way to a demand, besides the one that is moving."""
    beside_ns: int = 0
    """By how much longer attention, or a group of experts, takes beside a link that is busy when it starts."""


def make_costs(hardware: Hardware, model: ModelSpec, tokens: Ints, context: Ints, precision: str = "bf16") -> Costs:
    """Return what `model` costs on `hardware` in steps of `tokens` [S] reading `context` [S] tokens.

    Experts are stored, moved and read at `precision`, everything else at bf16. Sizes are per layer and per
    expert, so the routing may come from a trace with another number of layers than the model's: each of its
    layers costs what one of the model's does. Raises InputError where the model lacks a size.
    """
    hidden_size = _size(model, "hidden_size")
    expert_width = _size(model, "expert_width")
    other_bytes = _size(model, "other_bytes")
    kv_bytes = _size(model, "kv_bytes_per_token")
    expert_bytes = _expert_bytes(model, precision)
    chunk_bytes = min(hardware.chunk_bytes, expert_bytes)
    chunks = _ceil_divide(expert_bytes, chunk_bytes)
    train = hardware.h2d_train or hardware.h2d  # what a copy takes behind another one
    # Python's whole numbers: bytes times 1e9 leaves 64 bits, and a float could round the wrong way.
    attention = [
        max(
            _ceil_divide((other_bytes + step_context * kv_bytes) * NS, model.layers * hardware.memory_bandwidth),
            # A bf16 parameter has two bytes and costs every token two operations: bytes count both.
            _ceil_divide(step_tokens * other_bytes * NS, model.layers * hardware.flops),
        )
        for step_tokens, step_context in zip(tokens.tolist(), context.tolist(), strict=True)
    ]
    read_ns = _ceil_divide(expert_bytes * NS, hardware.memory_bandwidth)
    operations = 6 * hidden_size * expert_width
    expert = [
        hardware.expert_launch_ns + max(read_ns, _ceil_divide(count * operations * NS, hardware.flops))
        for count in range(1, int(tokens.max(initial=0)) + 1)
    ]
    attention_ns = np.array(attention, np.int64) + hardware.layer_launch_ns
    step_ns, group_ns = hardware.step_launch_ns, 0
    measured = hardware.models.get(model.name) if precision == "bf16" else None
    if measured is not None:
        attention_ns = np.array([along(measured.attention, each) for each in context.tolist()], np.int64)
        expert = [measured.expert_ns + each - expert[0] for each in expert]
        step_ns, group_ns = measured.step_ns, measured.group_ns
    return Costs(
        host_gate_ns=hardware.gate_issue_ns,
        host_experts_ns=hardware.expert_issue_ns,
        host_step_ns=hardware.host_step_ns,
        readout_ns=hardware.readout_ns,
        step_ns=np.full(len(tokens), step_ns, np.int64),
        attention_ns=attention_ns,
        expert_ns=np.array([0, *expert], np.int64),
        chunks=chunks,
        chunk_ns=along(train, chunk_bytes),
        last_chunk_ns=along(train, expert_bytes - (chunks - 1) * chunk_bytes),
        expert_bytes=expert_bytes,
        chunk_bytes=chunk_bytes,
        link_start_ns=max(0, along(hardware.h2d, chunk_bytes) - along(train, chunk_bytes)),
        step_readout_ns=NO_READOUT if hardware.step_readout_ns is None else hardware.step_readout_ns,
        group_ns=group_ns,
        demand_ns=(0, *(along(train, expert_bytes - (chunks - left) * chunk_bytes) for left in range(1, chunks + 1))),
        committed_chunks=hardware.committed_chunks,
        beside_ns=hardware.beside_ns,
    )


def with_free_link(costs: Costs) -> Costs:
    """Return the same costs with transfers that take no time: what remains is compute and host."""
    return costs._replace(chunk_ns=0, last_chunk_ns=0, link_start_ns=0, demand_ns=())


def transfer_ns(costs: Costs) -> int:
    """Return how long one expert occupies a link that was busy before, as a demand."""
    return demand_times(costs)[-1]


def demand_times(costs: Costs) -> tuple[int, ...]:
    """Return [chunks + 1] the link time of the last n chunks of an expert that an event waits for."""
    by_chunks = ((left - 1) * costs.chunk_ns + costs.last_chunk_ns for left in range(1, costs.chunks + 1))
    return costs.demand_ns or (0, *by_chunks)


def decode_layer_ns(costs: Costs, top_k: int) -> int:
    """Return the time of one layer for one token when nothing is waited for.

    From gate to gate: the read-out and the host's decision stand between a gate and its experts; the host
    issues the next layer's attention and gate while the experts, and then the first of it, already run. The
    context is the shortest of all steps, as a system would see when it measures itself before it serves.
    """
    compute_ns = costs.group_ns + top_k * int(costs.expert_ns[1]) + int(costs.attention_ns.min())
    return costs.readout_ns + costs.host_experts_ns + max(compute_ns, costs.host_gate_ns)


def along(curve: Curve, size: int) -> int:
    """Return the ns that `curve` has for `size`: linear between its points (size, ns).

    Below the first point it is the time there; beyond the last one the last segment goes on.
    """
    if size <= curve[0][0]:
        return curve[0][1]
    end = next((index for index, point in enumerate(curve) if size <= point[0]), len(curve) - 1)
    (from_bytes, from_ns), (to_bytes, to_ns) = curve[end - 1], curve[end]
    return from_ns + _ceil_divide((size - from_bytes) * (to_ns - from_ns), to_bytes - from_bytes)


def _size(model: ModelSpec, name: str) -> int:
    value: Any = getattr(model, name)
    if value is None:
        raise InputError(
            f"model '{model.name}' does not say its {name}, which timing needs: choose one that does with model=NAME"
        )
    return int(value)


def _expert_bytes(model: ModelSpec, precision: str) -> int:
    if not model.expert_bytes:
        raise InputError(
            f"model '{model.name}' does not say its expert_bytes, which timing needs: choose one that does with model=NAME"
        )
    if precision not in model.expert_bytes:
        raise InputError(
            f"model '{model.name}' has no expert_bytes at precision '{precision}': {nearest(precision, model.expert_bytes)};"
            " choose one with precision=NAME"
        )
    return int(model.expert_bytes[precision])


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
