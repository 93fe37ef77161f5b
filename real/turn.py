"""The host's turn between a gate and the first copy of what is missing, compiled: the link stands still for it.

It waits for the gate's words, finds out which experts are there, tells the eviction policy, and gives the first missing one
a slot and the link. In Python that took 30 to 60 microseconds a layer, twice as long whenever the processor was slow; all
that is not urgent is left to the executor, which has a whole copy's time for it.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from policies.residency import HELD
from real.decisions import ENTRY, Decisions, view
from real.device import Device, Memory
from sim.fast.callbacks import NOBODY, WRONG
from sim.fast.hooks import ADMIT, EVENT, EVICTION
from sim.fast.native import FAILED, call, compiled, entry, keep

NOT_YET, THERE, DECIDED, SENT, BROKEN = range(5)
"""How a turn ended: the words are not all there; they are, and nothing was to be decided; the event is judged; besides, the
first missing expert is on its way; the device refused its copy."""

_START, _TOTAL, _COUNT, _TAG = range(4)
"""Places of numbers: the words of the event."""
_FIRST_KEY, _NOW, _POOL, _SLOTS = range(4, 8)
"""The event."""
_FREE, _FREE_SLOT, _EVENT, _MARK_BEFORE, _MARK_AFTER = range(8, 13)
"""What `Turn.send` is given."""
_BITS, _OFFSET, _EXPERTS = range(13, 16)
"""How words are read."""
_MEMCPY, _RECORD, _STREAM, _TO, _FROM, _SLOT_BYTES, _EXPERT_BYTES = range(16, 23)
"""How a copy is started."""
_CLOCK, _TIME, _SEEN = range(23, 26)
"""C's clock, where it writes the time, and whether it has since `Turn.expect`."""
_UNION, _LEAVING, _SLOT, _CODE = range(26, 30)
"""Results."""

MONOTONIC = getattr(time, "CLOCK_MONOTONIC", 0)

_INT64 = ir.IntType(64)


class Words(NamedTuple):
    """Host memory into which the device writes what a gate chose: ``tag << bits | (expert + offset)`` each."""

    array: Any
    """int32 or int64"""
    bits: int
    offset: int


class Expected(NamedTuple):
    """The words of one event: from `start` on `total`, of which the last `routed` are routed ids; all carry `tag`."""

    start: int
    total: int
    routed: int
    tag: int


class Turn:
    """The turns of one run. `slot_of` [keys] is the executor's: the slot of every resident."""

    def __init__(
        self,
        decisions: Decisions,
        words: Words,
        device: Device,
        memory: Memory,
        expert_bytes: int,
        slot_of: Any,
    ) -> None:
        told, table = decisions.told, decisions.table
        keys, experts = len(slot_of), len(told.ids)
        self._ids: Any = np.zeros(len(words.array), np.int64)
        self._union: Any = np.zeros(experts, np.int64)
        self._time = np.zeros(2, np.int64)
        clock = _clock()
        calls = device.calls()
        self._numbers: Any = np.zeros(30, np.int64)
        for place, number in (
            (_BITS, words.bits),
            (_OFFSET, words.offset),
            (_EXPERTS, experts),
            (_MEMCPY, calls.memcpy),
            (_RECORD, calls.record),
            (_STREAM, calls.copy_stream),
            (_TO, memory.slots),
            (_FROM, memory.experts),
            (_SLOT_BYTES, memory.slot_bytes),
            (_EXPERT_BYTES, expert_bytes),
            (_CLOCK, clock),
            (_TIME, self._time.ctypes.data),
        ):
            self._numbers[place] = number
        self.numbers = view(self._numbers)
        self._state = _State(
            self._numbers, words.array, self._ids, self._union, np.full(keys, -1, np.int64), slot_of, table, told,
        )  # fmt: skip
        self._memory = np.zeros(256, np.int64)
        bound = np.zeros(1, np.int64)
        if not compiled(_bind)(self._state, self._memory.ctypes.data, self._memory.nbytes, bound):
            raise ValueError("a turn has more arrays than there is room for")
        self._call, self._at = ENTRY(int(bound[0])), self._memory.ctypes.data
        self._read_ids, self._read_union = view(self._ids), view(self._union)

    def expect(self, words: Expected, first_key: int, now: int, pool: int, slots: int) -> None:
        """Say which words come for event `now`, whose layer's first expert is `first_key` and whose pool has `slots`."""
        numbers = self.numbers
        numbers[_START], numbers[_TOTAL], numbers[_COUNT], numbers[_TAG] = words
        numbers[_FIRST_KEY], numbers[_NOW], numbers[_POOL], numbers[_SLOTS] = first_key, now, pool, slots
        numbers[_SEEN] = 0

    def take(self, looks: int) -> int:
        """Look for the words at most so often, and do no more; return `NOT_YET` or `THERE`."""
        return int(self._call(self._at, looks, 0, 0, 0))

    def decide(self, looks: int) -> int:
        """Look for the words at most so often, and judge the event if they are there."""
        return int(self._call(self._at, looks, 1, 0, 0))

    def send(self, looks: int, free: int, free_slot: int, event: int, marks: tuple[int, int]) -> int:
        """Look for the words at most so often, judge the event, and start the first copy if one is missing.

        Its pool has `free` slots, of which `free_slot` is the next. `event` is recorded behind the copy, and `marks` before
        and behind it if they are not 0. Only to be called while nothing is queued for the link and the host knows the events
        before to be computed: the copy waits for nobody.
        """
        numbers = self.numbers
        numbers[_FREE], numbers[_FREE_SLOT], numbers[_EVENT] = free, free_slot, event
        numbers[_MARK_BEFORE], numbers[_MARK_AFTER] = marks
        return int(self._call(self._at, looks, 1, 1, 0))

    @property
    def seen_ns(self) -> int:
        """When the words were first seen to be all there, on the host's clock; without C's clock, the time just now."""
        seconds, ns = self._time.tolist()
        return seconds * 1_000_000_000 + ns if self.numbers[_CLOCK] else time.perf_counter_ns()

    @property
    def routed(self) -> list[int]:
        """The routed ids, token by token; -1 for none."""
        return self._read_ids[: self.numbers[_COUNT]].tolist()

    @property
    def union(self) -> list[int]:
        """Keys that the event needs, each once, in the order of their first token."""
        return self._read_union[: self.numbers[_UNION]].tolist()

    @property
    def sent(self) -> tuple[int, int, int]:
        """Of the copy that is on its way: key, slot, and who left (`NOBODY` where a slot was free)."""
        numbers = self.numbers
        return int(self._state.told.demands[0]), numbers[_SLOT], numbers[_LEAVING]

    @property
    def wrong(self) -> int:
        """Whom the eviction policy chose when the turn ended `WRONG`."""
        return int(self._state.told.room[0])

    @property
    def code(self) -> int:
        """What the device answered when the turn ended `BROKEN`."""
        return int(self.numbers[_CODE])


class _State(NamedTuple):
    """What the compiled turn works on."""

    numbers: Any
    words: Any
    ids: Any
    union: Any
    needed: Any
    """[keys] the last event that needed the expert."""
    slot_of: Any
    table: Any
    told: Any


@intrinsic
def look(typing_context: Any, array: Any, index: Any) -> Any:
    """Return ``array[index]``, read anew at every call: somebody else writes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0]).data
        word = builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", kind.dtype.bitwidth // 8)
        return builder.sext(word, _INT64) if kind.dtype.bitwidth < 64 else word

    return types.int64(array, types.int64), generate


@intrinsic
def call_c(typing_context: Any, address: Any, numbers: Any) -> Any:
    """Call the C function at `address`, which takes whole numbers or addresses and returns an int."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = cgutils.unpack_tuple(builder, arguments[1])
        callee = ir.FunctionType(ir.IntType(32), [_INT64] * len(values)).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(arguments[0], callee), values), _INT64)

    return types.int64(types.int64, numbers), generate


@njit(forceinline=True)
def _start_copy(state: Any, key: Any, leaving: Any) -> Any:
    """Give `key` the slot of who is `leaving`, or the free one, and the link its bytes."""
    numbers = state.numbers
    slot = numbers[_FREE_SLOT] if leaving == NOBODY else state.slot_of[leaving]
    numbers[_LEAVING], numbers[_SLOT] = leaving, slot
    stream, size = numbers[_STREAM], numbers[_SLOT_BYTES]
    to, source = numbers[_TO] + slot * size, numbers[_FROM] + key * size
    code = 0
    if numbers[_MARK_BEFORE]:
        code = call_c(numbers[_RECORD], (numbers[_MARK_BEFORE], stream))
    if not code:
        code = call_c(numbers[_MEMCPY], (to, source, numbers[_EXPERT_BYTES], stream))
    if not code and numbers[_MARK_AFTER]:
        code = call_c(numbers[_RECORD], (numbers[_MARK_AFTER], stream))
    if not code:
        code = call_c(numbers[_RECORD], (numbers[_EVENT], stream))
    numbers[_CODE] = code
    return BROKEN if code else SENT


def _turn(state: Any, looks: Any, decide: Any, send: Any, d: Any) -> Any:
    """See `Turn`; compiled."""
    numbers, words, told, table = state.numbers, state.words, state.told, state.table
    bits, tag, start, total = numbers[_BITS], numbers[_TAG], numbers[_START], numbers[_TOTAL]
    stop = start + total
    while look(words, stop - 1) >> bits != tag:
        looks -= 1
        if looks <= 0:
            return NOT_YET
    for place in range(start, stop):
        if look(words, place) >> bits != tag:
            return NOT_YET
    if numbers[_CLOCK] and not numbers[_SEEN]:
        call_c(numbers[_CLOCK], (MONOTONIC, numbers[_TIME]))
        numbers[_SEEN] = 1
    count, experts = numbers[_COUNT], numbers[_EXPERTS]
    for place in range(count):
        expert = (words[stop - count + place] & ((1 << bits) - 1)) - numbers[_OFFSET]
        state.ids[place] = expert if 0 <= expert < experts else -1
    if not decide:
        return THERE

    now, pool, first_key = numbers[_NOW], numbers[_POOL], numbers[_FIRST_KEY]
    union = hits = misses = 0
    for place in range(count):
        expert = state.ids[place]
        if expert < 0 or state.needed[first_key + expert] == now:
            continue
        key = first_key + expert
        state.needed[key] = now
        state.union[union] = key
        union += 1
        if told.experts[key].resident:
            told.hits[hits] = key
            hits += 1
        else:
            told.misses[misses] = key
            misses += 1
    numbers[_UNION] = union
    if union and call(table[EVENT], table[EVICTION], hits, misses, pool, now) == FAILED:
        return FAILED
    if not send or misses == 0 or union > numbers[_SLOTS]:
        return DECIDED

    for place in range(hits):
        told.holds[told.hits[place]] = HELD
    told.demands[0] = told.misses[0]
    told.room[0], told.room[1] = numbers[_FREE], HELD
    admitted = call(table[ADMIT], table[EVICTION], 0, 1, pool, now)
    if admitted < 0:  # FAILED or WRONG
        return admitted
    if admitted == 0:
        return DECIDED
    leaving = told.left[0]
    if leaving != NOBODY and told.experts[leaving].pool != pool:
        told.room[0] = leaving
        return WRONG
    return _start_copy(state, told.demands[0], leaving)


_turn_entry = entry(_turn)


def _bind(state: Any, memory: Any, size: Any, place: Any) -> Any:
    if not keep(state, memory, size):
        return False
    place[0] = _turn_entry(state)
    return True


def _clock() -> int:
    """Return the address of C's `clock_gettime` where it is what `time.perf_counter_ns` reads; else 0."""
    if time.get_clock_info("perf_counter").implementation != "clock_gettime(CLOCK_MONOTONIC)":
        return 0
    return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
