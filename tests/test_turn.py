"""The compiled turn by hand: what it reads, decides, starts and says, one call at a time."""

import ctypes
import time

import numpy as np
import pytest
from builders import make_trace
from test_engines_agree import OneQueue, composition

import real.turn
from policies.residency import AWAITED, HELD
from policies.system import Composition
from real.decisions import Decisions
from real.device import COPY, Memory
from real.standin import StandIn
from real.turn import BROKEN, DECIDED, NOT_YET, SENT, THERE, Expected, Turn, Words
from sim.conformance import build
from sim.fast.callbacks import NOBODY, WRONG
from sim.fast.native import FAILED
from sim.workload import make_workload
from traces.errors import InputError

EXPERT_BYTES, SLOT_BYTES, TAG = 6, 8, 7


class Desk:
    """A turn with all that it needs: two layers of 4 experts, `slots` slots, words that hold the expert's number + 1."""

    def __init__(self, slots=3, tried=None, **options):
        workload = make_workload(make_trace([[[0], [0]]] * 9, expert_count=4))
        system = build(tried or composition(), workload, slots)
        self.decisions = Decisions.on_trace(system, workload)
        self.device = StandIn("lazy", **options)
        self.slots = np.full((slots, SLOT_BYTES), 255, np.uint8)
        self.experts = np.repeat(np.arange(8, dtype=np.uint8), SLOT_BYTES)
        self.slot_of = np.full(8, -1, np.int64)
        self.words = Words(np.zeros(8, np.int32), 11, 1)
        memory = Memory(self.slots.ctypes.data, self.experts.ctypes.data, SLOT_BYTES)
        self.turn = Turn(self.decisions, self.words, self.device, memory, EXPERT_BYTES, self.slot_of)
        self.free = slots
        self.event = 0

    def expect(self, ids, *, first_key=0, pool=0, slots=3, before=()):
        """Write the words of the next event: those of `before` and, last, `ids`; -1 for none."""
        written = [*before, *ids]
        self.words.array[: len(written)] = [TAG << 11 | (number + 1) for number in written]
        self.turn.expect(Expected(0, len(written), len(ids), TAG), first_key, self.event, pool, slots)
        self.event += 1

    def send(self, marks=(0, 0)):
        return self.turn.send(1, self.free, self.free - 1 if self.free else -1, self.device.next_event(COPY), marks)

    def settle(self):
        """Do what the executor does with a copy that was sent, and let it land."""
        key, slot, leaving = self.turn.sent
        if leaving != NOBODY:
            self.decisions.resident[leaving], self.decisions.holds[leaving], self.slot_of[leaving] = False, HELD, -1
        else:
            self.free -= 1
        self.decisions.resident[key], self.decisions.holds[key], self.slot_of[key] = True, 1, slot
        self.device.recorded(COPY)
        self.device.drain()
        return key, slot, leaving


def test_nothing_happens_before_the_last_word_is_there():
    desk = Desk()
    desk.expect([2, 1])
    desk.words.array[0] = (TAG - 1) << 11 | 3  # of the event before
    assert desk.send() == NOT_YET
    assert desk.turn.take(5) == NOT_YET
    desk.words.array[0] = TAG << 11 | 3
    assert desk.turn.take(1) == THERE
    assert desk.turn.routed == [2, 1]


def test_ids_are_the_last_words_and_each_expert_is_needed_once():
    desk = Desk()
    desk.expect([2, -1, 0, 2], before=[9, 9], slots=2)
    assert desk.turn.decide(1) == DECIDED
    assert (desk.turn.routed, desk.turn.union) == ([2, -1, 0, 2], [2, 0])


def test_words_of_64_bits_say_nothing_by_a_number_that_no_expert_has():
    desk = Desk()
    words = Words(np.array([TAG << 32 | 3, TAG << 32 | 0xFFFFFFFF]), 32, 0)
    turn = Turn(desk.decisions, words, desk.device, Memory(0, 0, 8), 8, desk.slot_of)
    turn.expect(Expected(0, 2, 2, TAG), 4, 0, 0, 3)
    assert (turn.decide(1), turn.routed, turn.union) == (DECIDED, [3, -1], [7])


def test_the_first_missing_expert_takes_the_free_slot_and_its_bytes_cross():
    desk = Desk()
    desk.expect([3, 1])
    assert desk.send() == SENT
    assert desk.settle() == (3, 2, NOBODY)
    assert desk.slots[2].tolist() == [3] * EXPERT_BYTES + [255] * 2
    assert (desk.slots[:2] == 255).all()


def test_an_expert_that_is_there_is_held_and_who_is_not_needed_leaves():
    desk = Desk(slots=2)
    for key in (0, 1):
        desk.expect([key], slots=2)
        assert desk.send() == SENT
        desk.settle()
    desk.expect([0, 2], slots=2)
    assert desk.send() == SENT
    key, slot, leaving = desk.turn.sent
    assert (key, leaving) == (2, 1)
    assert slot == desk.slot_of[1]
    assert desk.decisions.holds[0] == HELD


def test_nobody_is_sent_where_nobody_may_leave_or_all_is_there_or_the_event_runs_in_waves():
    desk = Desk(slots=1)
    desk.expect([0], slots=1)
    assert desk.send() == SENT
    desk.settle()
    desk.expect([0], slots=1)
    assert desk.send() == DECIDED
    desk.expect([1, 2], slots=1)
    assert desk.send() == DECIDED
    desk.decisions.holds[0] = HELD
    desk.expect([1], slots=1)
    assert desk.send() == DECIDED
    assert (desk.slots == 0)[0, :EXPERT_BYTES].all()


def test_a_demand_may_take_the_slot_of_what_is_awaited_for_a_coming_event():
    desk = Desk(slots=1)
    desk.expect([0], slots=1)
    desk.send()
    desk.settle()
    desk.decisions.holds[0] = AWAITED
    desk.expect([1], slots=1)
    assert desk.send() == SENT
    assert desk.turn.sent[2] == 0


def test_a_victim_of_another_pool_is_named_and_nothing_is_overwritten():
    tried = composition(allocation="uniform")
    desk = Desk(slots=2, tried=Composition("tried", {**tried.parts, "eviction": (OneQueue, {})}))
    desk.expect([0], slots=1)
    assert desk.turn.send(1, 1, 0, desk.device.next_event(COPY), (0, 0)) == SENT
    desk.settle()
    desk.expect([1], first_key=4, pool=1, slots=1)
    assert desk.turn.send(1, 0, -1, desk.device.next_event(COPY), (0, 0)) == WRONG
    assert desk.turn.wrong == 0
    desk.device.drain()
    assert desk.slots[0, 0] == 0


class Raises(OneQueue):
    """Has no room for what happens."""

    def on_miss(self, key, pool, now):
        raise ValueError("no more")


def test_what_a_policy_raises_reaches_the_caller():
    tried = composition()
    desk = Desk(tried=Composition("tried", {**tried.parts, "eviction": (Raises, {})}))
    desk.expect([0])
    assert desk.send() == FAILED
    with pytest.raises(Exception, match=r"no more|raised an exception"):
        desk.decisions.failed()


def test_a_copy_that_the_device_refuses_is_raised_by_it():
    desk = Desk(fail_at_copy=1)
    desk.device._pace = ("eager", "eager")
    desk.expect([0])
    assert desk.send() == BROKEN
    with pytest.raises(InputError, match="a host-to-device copy failed"):
        desk.device.fail(desk.turn.code)


def test_marks_stand_before_and_behind_the_copy():
    desk = Desk()
    (before, first), (after, second) = desk.device.open_mark(), desk.device.open_mark()
    desk.expect([0])
    assert desk.send((first, second)) == SENT
    begin = time.perf_counter_ns()
    desk.settle()
    assert begin < desk.device.mark_ns(before) < desk.device.mark_ns(after) < time.perf_counter_ns()


def test_the_time_at_which_the_words_were_seen_is_the_host_s_with_or_without_c_s_clock(monkeypatch):
    for clock in (real.turn._clock, lambda: 0):
        monkeypatch.setattr(real.turn, "_clock", clock)
        desk = Desk()
        desk.expect([0])
        begin = time.perf_counter_ns()
        desk.turn.take(1)
        assert begin <= desk.turn.seen_ns <= time.perf_counter_ns()


def test_a_number_of_a_c_function_keeps_its_sign():
    called = []
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 2)(lambda *numbers: called.append(numbers) or -5)
    desk = Desk()
    desk.turn._numbers[real.turn._RECORD] = ctypes.cast(function, ctypes.c_void_p).value
    desk.expect([0])
    assert desk.send() == BROKEN
    assert (called, desk.turn.code) == ([(1, COPY)], -5)
