"""What the engine's loop calls in a policy: a table of addresses, and the states that they work on.

A policy that numba can compile is compiled; any other is called back in plain Python (`sim.fast.callbacks`). The loop does
not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Setting
from policies.residency import FREE, HELD
from policies.system import System
from sim.fast.callbacks import NOBODY, WRONG, PythonEviction, PythonPredictor, callback
from sim.fast.members import insert, make_members, remove, touch, victim
from sim.fast.native import NUMBER, bind, entry, keep, not_compiled
from sim.fast.observed import Observed, see
from traces.errors import InputError

EVENT, ADMIT, EVICTED, OBSERVE, PREDICT, MOST, TAKE, EVICTION, PREDICTOR, PREFETCH = range(10)
"""Places in the table: seven entries (0 where there is nothing to call), then the states of the three policies."""

PLACES = (
    *("event_entry", "admit_entry", "evicted_entry", "observe_entry", "predict_entry", "most_entry", "take_entry"),
    *("eviction_state", "predictor_state", "prefetch_state"),
)
"""Their names in `sim.fast.state.RUN`."""


class Told(NamedTuple):
    """What the loop writes for policies to read: memory that they share, so that a call carries four numbers only."""

    holds: Any
    """[keys] int8: how firmly every key is held (policies.residency): HELD where it has no slot."""
    hits: Any
    """[E] int32: keys of the running event that were there."""
    misses: Any
    """[E] int32: keys of the running event that were not."""
    wave: Any
    """[E] int32: keys that the event holds while it runs in waves."""
    demands: Any
    """[E] int32: keys that are to take slots, in this order."""
    left: Any
    """[E] int32: who left for each of them, or NOBODY."""
    room: Any
    """[2]: free slots of their pool, and the limit below which a resident must be held to leave for them. In the end, if the
    policy chose somebody who may not leave, the first is that key."""
    seen: Any
    """[5]: event, layer, of its observed rows the first and the one after the last, and the first of its floats."""
    ids: Any
    """[E]: what a predictor writes."""
    scores: Any
    """[E]"""
    experts: Any
    """[keys] `sim.fast.state.EXPERT`: who holds a slot."""


def make_told(setting: Setting, experts: Any) -> Told:
    """Return the shared memory of one run."""
    return Told(
        holds=np.full(setting.keys, HELD, np.int8),
        hits=np.zeros(setting.experts, np.int32),
        misses=np.zeros(setting.experts, np.int32),
        wave=np.zeros(setting.experts, np.int32),
        demands=np.zeros(setting.experts, np.int32),
        left=np.zeros(setting.experts, np.int32),
        room=np.zeros(2, np.int64),
        seen=np.zeros(5, np.int64),
        ids=np.zeros(setting.experts, np.int64),
        scores=np.zeros(setting.experts, np.float64),
        experts=experts,
    )


class Hooks:
    """The policies of one system, ready to be called by the loop."""

    def __init__(self, system: System, told: Told, *, interpret: bool = False) -> None:
        """Compile what can be compiled; `interpret` runs every policy in Python all the same."""
        self.table = np.zeros(10, np.int64)
        self.faults: list[BaseException] = []
        """What policies run in Python raised."""
        self.interpreted: list[str] = []
        """Axes whose policies run in Python."""
        self._system, self._told, self._interpret = system, told, interpret
        self._alive: list[Any] = []
        """States, memories and callbacks that the table points to."""
        self._bind_eviction()

    def observe(self, observed: Observed) -> None:
        """Show the predictor the rows of the next part of the run."""
        if not self._system.prefetch.depth:
            return
        if self._observe is None:
            self._bind_prefetch()
            self._bind_predictor(observed)
        self._observe(observed)
        if not hasattr(self._system.predictor, "observe"):
            self.table[OBSERVE] = 0

    _observe: Any = None

    def _bind_eviction(self) -> None:
        policy, told, setting = self._system.eviction, self._told, self._system.setting
        if not self._compile(
            "eviction", EVICTION, _bind_eviction, policy, lambda: (policy, told, make_members(setting, policy))
        ):
            python = PythonEviction(policy, setting, told)
            self._call_back({EVENT: (python.event, 4), ADMIT: (python.admit, 4), EVICTED: (python.evicted, 3)})

    def _bind_prefetch(self) -> None:
        policy, scores = self._system.prefetch, self._told.scores
        if not self._compile("prefetch", PREFETCH, _bind_prefetch, policy, lambda: (policy, self._told)):
            self._call_back({MOST: (policy.most, 1), TAKE: (lambda count: policy.take(scores, count), 1)})
        if not hasattr(policy, "take"):
            self.table[TAKE] = 0

    def _bind_predictor(self, observed: Observed) -> None:
        policy, told = self._system.predictor, self._told
        if self._compile("predictor", PREDICTOR, _bind_predictor, policy, lambda: (policy, told, observed)):
            self._observe = lambda rows: self._put(PREDICTOR, _bind_predictor, (policy, told, rows))
        else:
            python = PythonPredictor(policy, told)
            self._call_back({OBSERVE: (python.observe, 0), PREDICT: (python.predict, 2)})
            self._observe = python.show

    def _compile(self, axis: str, place: int, entries: Callable[..., Any], policy: Any, state: Callable[[], Any]) -> bool:
        """Compile the entries of a policy, if numba can (an empty tuple it cannot pass), and put its state into memory."""
        cls = type(policy)
        if not self._interpret and cls not in not_compiled and issubclass(cls, tuple) and len(policy):
            try:
                self._put(place, entries, state())
            except InputError:
                raise
            except Exception:  # numba has many ways to say that it cannot; tests make sure that it can all of ours
                not_compiled.add(cls)
            else:
                return True
        self.interpreted.append(axis)
        return False

    def _put(self, place: int, entries: Callable[..., Any], state: Any) -> None:
        memory = bind(entries, type(state[0]), state, self.table)
        self.table[place] = memory.ctypes.data
        self._alive = [kept for kept in self._alive if kept[0] != place] + [(place, state, memory)]

    def _call_back(self, functions: dict[int, tuple[Callable[..., Any], int]]) -> None:
        for place, (function, numbers) in functions.items():
            self.table[place], kept = callback(function, numbers, self.faults)
            self._alive.append((place, kept))


# ---- entries of eviction policies ---------------------------------------------------------------------------------


def event(state: Any, hits: Any, misses: Any, pool: Any, now: Any) -> Any:
    """Tell the policy which experts of an event are there and which are not."""
    policy, told, members = state
    pool &= NUMBER
    for index in range(hits):
        key = told.hits[index] & NUMBER
        policy.on_hit(key, pool, now)
        touch(policy, members, key, pool, now)
    for index in range(misses):
        policy.on_miss(told.misses[index] & NUMBER, pool, now)
    return 0


def admit(state: Any, first: Any, stop: Any, pool: Any, now: Any) -> Any:
    """Give the experts `first` to `stop` of `Told.demands` a slot each, in order; return how far that went, or WRONG."""
    policy, told, members = state
    pool &= NUMBER
    free, highest = told.room[0], told.room[1]
    for number in range(first, stop):
        index = number & NUMBER
        key, leaving = told.demands[index] & NUMBER, NOBODY
        if told.experts[key].resident:  # in flight when its event started
            continue
        if free > 0:
            free -= 1
        else:
            # For a demand, those who were prefetched for a coming event leave if nobody else can.
            limit = FREE
            while leaving < 0 and limit < highest:
                limit += 1
                leaving = victim(policy, members, told.holds, pool, limit, now)
            if leaving < 0:
                return index
            leaving &= NUMBER
            if leaving >= len(told.holds) or told.holds[leaving] >= limit:
                told.room[0] = leaving
                return WRONG
            remove(policy, members, leaving, pool, now)
            policy.on_evict(leaving, pool, now)
            told.holds[leaving] = HELD
        policy.on_insert(key, pool, now)
        insert(policy, members, key, pool, now)
        told.left[index] = leaving
    return stop


def evicted(state: Any, key: Any, pool: Any, now: Any, d: Any) -> Any:
    """Tell the policy that `key` lost its slot for another reason than to make room."""
    policy, _, members = state
    key, pool = key & NUMBER, pool & NUMBER
    remove(policy, members, key, pool, now)
    policy.on_evict(key, pool, now)
    return 0


_event, _admit, _evicted = entry(event), entry(admit), entry(evicted)


def _bind_eviction(state: Any, memory: Any, size: Any, table: Any) -> Any:
    if not keep(state, memory, size):
        return False
    table[EVENT], table[ADMIT], table[EVICTED] = _event(state), _admit(state), _evicted(state)
    return True


# ---- entries of predictors and prefetch rules ---------------------------------------------------------------------


def observe(state: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Let the predictor learn from the running event."""
    policy, told, observed = state
    policy.observe(see(told, observed))
    return 0


def predict(state: Any, ahead: Any, most: Any, c: Any, d: Any) -> Any:
    """Let the predictor write up to `most` experts expected `ahead` layers later; return how many."""
    policy, told, observed = state
    ahead, most = ahead & NUMBER, most & NUMBER
    return policy.predict(see(told, observed), ahead, told.ids[:most], told.scores[:most])


_observe, _predict = entry(observe), entry(predict)


def _bind_predictor(state: Any, memory: Any, size: Any, table: Any) -> Any:
    if not keep(state, memory, size):
        return False
    table[OBSERVE], table[PREDICT] = _observe(state), _predict(state)
    return True


def most(state: Any, tokens: Any, b: Any, c: Any, d: Any) -> Any:
    """Return how many experts the prefetch rule would take at most."""
    policy, _ = state
    return policy.most(tokens)


def take(state: Any, count: Any, b: Any, c: Any, d: Any) -> Any:
    """Return how many of the predicted experts the prefetch rule takes."""
    policy, told = state
    return policy.take(told.scores, count)


_most, _take = entry(most), entry(take)


def _bind_prefetch(state: Any, memory: Any, size: Any, table: Any) -> Any:
    if not keep(state, memory, size):
        return False
    table[MOST], table[TAKE] = _most(state), _take(state)
    return True
