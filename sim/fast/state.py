"""The state of a run: tables of records that the loop finds by their addresses, so that a call passes one pointer.

`RUN` is one record; everything else hangs on it. Passing arrays to compiled functions instead costs more time than the
whole memory model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)

RUN = np.dtype(
    [
        (name, np.int64)
        for name in (
            # costs, as in sim.costs.Costs
            *("host_gate_ns", "host_experts_ns", "host_step_ns", "readout_ns"),
            *("chunks", "chunk_ns", "last_chunk_ns", "expert_bytes", "chunk_bytes", "link_start_ns", "step_readout_ns"),
            *("group_ns", "committed_chunks", "beside_ns", "shared_ns", "host_demand_ns", "host_ahead_ns"),
            # shape and system
            *("layers", "experts", "keys", "events", "depth", "drop_unused_prefetches", "reupload_after_use"),
            # clocks; `row` is the running event's in COMING, `first_key` its layer's
            *("time", "host", "compute", "now", "layer", "step", "row", "first_key"),
            # the running event: when it ends (NEVER before that is known and after it has), how many experts it holds,
            # where the list of their keys is, and how many it waits for
            *("release_ns", "held", "held_at", "outstanding"),
            # link: the expert on it, the alarm that ends its turn, how many demands wait
            *("moving", "moving_since", "alarm", "alarm_ns", "demands", "busy_ns"),
            # counters of the run, and of the running step
            *("prefetches", "cancelled", "predicted", "predicted_and_needed", "needed_after_prediction"),
            *("taken", "peak_slots", "demand_bytes", "useful_bytes", "late_bytes", "wasted_bytes", "refresh_bytes"),
            *("hits", "late_hits", "misses", "host_idle", "waited", "computed"),
            # why the run stopped, and over which number
            *("broken", "broken_by"),
            # addresses: tables of records
            *("experts_at", "transfers_at", "pools_at", "coming_at", "steps_at"),
            # lists of one event, see sim.fast.run.make_tables
            *("takes_at", "landed_at", "wanted_at"),
            # arrays that policies see (sim.fast.hooks.Told)
            *("holds_at", "hits_at", "misses_at", "wave_at", "demands_at", "left_at", "room_at", "seen_at", "ids_at"),
            # events of the present part of the trace
            *("first_event", "first_step", "offsets_at", "keys_at", "tokens_at", "expert_ns_at", "demand_ns_at"),
            # entries of the policies and their states (sim.fast.hooks)
            *("event_entry", "admit_entry", "evicted_entry", "observe_entry", "predict_entry", "most_entry", "take_entry"),
            *("eviction_state", "predictor_state", "prefetch_state"),
        )
    ],
    align=True,
)
"""One run: every single number of it."""

LOGGED_RUN = np.dtype([(name, np.int64) for name in ("logged", "log_room", "log_at", *(RUN.names or ()))], align=True)
"""One run that keeps a log: entries, room for them, and where they are. These stand first, or numba would take it for a RUN
with something added and warn of that."""

NONE, QUEUED, STARTED = 0, 1, 3
"""What an expert's transfer is: there is none; it waits for the link; it has moved a chunk, or is about to. In bits, so
that what has started stays so when it is queued, and that `resident` and this say who is in flight."""

EXPERT = np.dtype(
    [
        ("unused", np.int32),  # event that a prefetched expert, not used yet, was fetched for; -1 for others
        ("needed", np.int32),  # last event that needed the expert
        ("pool", np.int16),
        ("resident", np.int8),  # 1: it holds a slot
        ("transfer", np.int8),  # NONE, QUEUED or STARTED
        ("demand", np.bool_),  # an event waits for the transfer
        ("refresh", np.bool_),  # the transfer renews a resident
    ],
    align=True,
)
"""[keys] one expert: what the dictionaries of the reference engine hold. Read most, so small."""

TRANSFER = np.dtype(
    [
        ("target", np.int32),  # event that the transfer is for
        ("older", np.int32),  # neighbours in the queue of prefetches; itself, while it is not in it
        ("newer", np.int32),
        ("chunks_left", np.int32),  # all of them, while there is no transfer
    ]
)
"""[keys + 1] the transfer of an expert, while there is one: the rest of `sim.link.Transfer`. The last record is both ends of
the queue, so that nobody who joins or leaves it has to ask whether there are others."""

POOL = np.dtype([("capacity", np.int64), ("taken", np.int64)])
"""[pools]"""

COMING = np.dtype([("predicted", np.int64), ("prefetched", np.int64), ("first_key", np.int64), ("cells_at", np.int64)])
"""[depth + 1] of a coming event: experts predicted (-1: no prediction), how many took a slot for it, its layer's first key,
and the address of its row of CELL."""

CELL = np.dtype(
    [
        ("choice", np.int32),  # list of the experts predicted for the event
        ("prefetched", np.int32),  # list of the keys that took a slot for it
        ("predicted", np.bool_),  # whether the expert of this number is predicted
        ("listed", np.bool_),  # whether it stands in the list `prefetched`
    ],
    align=True,
)
"""[depth + 1, experts] of a coming event."""

STEP = np.dtype(
    [
        ("attention_ns", np.int64),
        ("step_ns", np.int64),
        ("first_row", np.int64),  # of its tokens, among the rows that predictors see
        ("last_row", np.int64),  # one after them
        ("first_float", np.int64),  # of its tokens, among the rows of floats that predictors see
        *((name, np.int64) for name in ("computed", "waited", "host_idle", "hits", "late_hits", "misses")),
    ]
)
"""[steps] of the present part: what a step costs, and what it counted."""

LOG = np.dtype([("ns", np.int64), ("what", np.int64), ("key", np.int64), ("event", np.int64)])


@intrinsic
def record(typing_context: Any, address: Any, index: Any, kind: Any) -> Any:
    """Return record `index` of the table of `kind` (a dtype) at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        offset = builder.mul(arguments[1], ir.Constant(arguments[1].type, signature.return_type.size))
        return builder.inttoptr(builder.add(arguments[0], offset), context.get_value_type(signature.return_type))

    return kind.dtype(types.int64, types.int64, kind), generate


@intrinsic
def number(typing_context: Any, address: Any, index: Any, kind: Any) -> Any:
    """Return number `index` of the array of `kind` (a dtype) at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_type = context.get_value_type(kind.dtype)
        pointer = builder.gep(builder.inttoptr(arguments[0], value_type.as_pointer()), [arguments[1]])
        return builder.sext(builder.load(pointer), ir.IntType(64)) if value_type.width < 64 else builder.load(pointer)

    return types.int64(types.int64, types.int64, kind), generate


@intrinsic
def put(typing_context: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Write number `index` of the array of `kind` (a dtype) at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_type = context.get_value_type(kind.dtype)
        pointer = builder.gep(builder.inttoptr(arguments[0], value_type.as_pointer()), [arguments[1]])
        written = builder.trunc(arguments[2], value_type) if value_type.width < 64 else arguments[2]
        builder.store(written, pointer)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, kind), generate


# ---- what the loop calls them -------------------------------------------------------------------------------------


@njit(forceinline=True)
def expert_of(run: Any, key: Any) -> Any:
    """Return the record of an expert key."""
    return record(run.experts_at, key, EXPERT)


@njit(forceinline=True)
def transfer_of(run: Any, key: Any) -> Any:
    """Return the record of an expert's transfer."""
    return record(run.transfers_at, key, TRANSFER)


@njit(forceinline=True)
def pool_of(run: Any, pool: Any) -> Any:
    """Return the record of a pool."""
    return record(run.pools_at, pool, POOL)


@njit(forceinline=True)
def coming(run: Any, ahead: Any) -> Any:
    """Return the record of the event `ahead` of the running one."""
    row = run.row + ahead
    return record(run.coming_at, row - run.depth - 1 if row > run.depth else row, COMING)


@njit(forceinline=True)
def cell(event: Any, index: Any) -> Any:
    """Return entry `index` of the lists, and of the experts, of a coming event."""
    return record(event.cells_at, index, CELL)


@njit(forceinline=True)
def step_of(run: Any) -> Any:
    """Return the record of the running step."""
    return record(run.steps_at, run.step - run.first_step, STEP)
