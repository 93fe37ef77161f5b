"""The policies of a system as the executor calls them: compiled once, called by address, as in the fast engine.

A call costs the host about a microsecond; the same methods in Python cost up to eighty for one victim, while the link stands
still. What numba cannot compile is called back in Python: nobody here knows which.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from policies.residency import ContractError, no_prediction, no_victim
from policies.system import System
from sim.fast.callbacks import WRONG
from sim.fast.hooks import (
    ADMIT,
    EVICTED,
    EVICTION,
    MOST,
    OBSERVE,
    PREDICT,
    PREDICTOR,
    PREFETCH,
    TAKE,
    Hooks,
    make_told,
)
from sim.fast.native import FAILED, PARAMETERS, call, compiled
from sim.fast.observed import Observed
from sim.fast.run import PolicyRaised
from sim.fast.state import EXPERT
from sim.observations import Observations
from sim.workload import Workload

REFUSED = -2
"""What `Decisions.admit` returns where nobody may leave."""

ENTRY = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (1 + PARAMETERS))
"""A function that was compiled to be called by its address (`sim.fast.native.entry`)."""


class Decisions:
    """The policies of a freshly built `system`; predictors see rows ``rows(step)`` (first, last + 1) of `observed`.

    A run has `events` events: nothing is predicted beyond them.
    """

    def __init__(self, system: System, observed: Observed, rows: Callable[[int], tuple[int, int]], events: int) -> None:
        self.system = system
        self._rows = rows
        told = self.told = make_told(system.setting, np.zeros(system.setting.keys, EXPERT))
        told.experts["pool"] = np.repeat(system.setting.pool_of, system.setting.experts)
        self.resident = memoryview(told.experts["resident"])
        """[keys] who holds a slot; the executor writes it."""
        self.holds = memoryview(told.holds)
        """[keys] how firmly; the executor writes it, and whoever has no slot stays HELD."""
        self._seen = memoryview(told.seen)
        self._demands, self._left, self._room = memoryview(told.demands), memoryview(told.left), memoryview(told.room)
        self._hooks = Hooks(system, told)
        self._hooks.observe(observed)
        self._observed = observed
        table = self.table = self._hooks.table
        self._eviction = int(table[EVICTION])
        self._admit, self._evicted = (ENTRY(int(table[place])) for place in (ADMIT, EVICTED))
        depth, experts = system.prefetch.depth, system.setting.experts
        self._events = events
        self._look_ahead = compiled(look_ahead)
        self._busy = np.zeros(system.setting.keys, np.bool_)
        self.busy = view(self._busy)
        """[keys] who has a transfer, or lost its slot in the running event; the executor writes it."""
        self._rows_ahead, self._width = depth + 1, experts + 1
        self._predicted = np.zeros((depth + 1, experts + 1), np.uint8)
        """[event modulo depth + 1, expert] what was predicted for it; the last column says whether anything was."""
        self._flags = view(self._predicted.reshape(-1))
        self._wanted = np.zeros((max(depth, 1) * experts, 2), np.int64)

    @classmethod
    def on_trace(cls, system: System, workload: Workload) -> Decisions:
        """Return the decisions of `system` on the recorded routing of `workload`."""
        seen = Observations(workload, system.composition.needs)
        layers = system.setting.layers
        ranking, scores = np.zeros((0, layers, 0, 0), np.int8), np.zeros((0, layers, 0, 0), np.float32)
        values = np.zeros((0, layers, 0), np.float32)
        observed = Observed(
            experts=seen.experts,
            weights=values if seen.weights is None else seen.weights,
            request=seen.request.astype(np.int64),
            lookahead_experts=ranking if seen.lookahead_experts is None else seen.lookahead_experts,
            lookahead_scores=scores if seen.lookahead_scores is None else seen.lookahead_scores,
            router_logits=values if seen.router_logits is None else seen.router_logits,
        )
        return cls(system, Observed(*map(np.ascontiguousarray, observed)), seen.rows, workload.events.total)

    def admit(self, key: int, pool: int, free: int, limit: int, now: int) -> int:
        """Give `key` one of `free` slots, or that of somebody held below `limit` where there is none.

        Return who left; NOBODY where nobody had to, REFUSED where nobody may. Raises ContractError for a wrong victim.
        """
        self._demands[0], self._room[0], self._room[1] = key, free, limit
        admitted = self._admit(self._eviction, 0, 1, pool, now)
        if admitted == FAILED:
            self.failed()
        if admitted == WRONG:
            self.wrong_victim(self._room[0])
        leaving: int = self._left[0] if admitted else REFUSED
        return leaving

    def evicted(self, key: int, pool: int, now: int) -> None:
        """Tell that `key` lost its slot for another reason than to make room."""
        if self._evicted(self._eviction, key, pool, now, 0) == FAILED:
            self.failed()

    def look_ahead(self, step: int, layer: int, now: int) -> list[tuple[int, int]]:
        """Let the predictor learn from event `now` and look ahead; return what to fetch: (key, the event that is to use it).

        Whoever is neither resident nor `busy` is fetched, and is `busy` from here on.
        """
        first, last = self._rows(step)
        for place, number in enumerate((now, layer, first, last, first)):
            self._seen[place] = number
        found = self._look_ahead(
            self.table, now, self._events, layer, last - first, self.told.experts, self._busy, self.told.ids,
            self._predicted, self._wanted,
        )  # fmt: skip
        if found == FAILED:
            self.failed()
        if found < 0:
            wrong = int(self._wanted[0, 0])
            raise ContractError(no_prediction(type(self.system.predictor).__name__, wrong, self.system.setting.experts))
        return [(key, target) for key, target in self._wanted[:found].tolist()]

    def predicted(self, now: int) -> bytes | None:
        """Return for every expert whether it was predicted for event `now`, and forget it; None without a prediction."""
        start = now % self._rows_ahead * self._width
        row = bytes(self._flags[start : start + self._width])
        if not row[-1]:
            return None
        self._flags[start : start + self._width] = bytes(self._width)
        return row[:-1]

    def wrong_victim(self, key: int) -> NoReturn:
        """Raise ContractError: the eviction policy chose `key`, who may not leave."""
        raise ContractError(no_victim(type(self.system.eviction).__name__, key))

    def failed(self) -> NoReturn:
        """Raise what a policy raised."""
        if self._hooks.faults:
            raise self._hooks.faults[0]
        raise PolicyRaised("a compiled policy raised an exception; the reference engine (engine=reference) tells which")


def view(array: Any) -> memoryview[Any]:
    """Return an array as what Python reads and writes quickest."""
    return memoryview(array)


def look_ahead(
    table: Any,
    now: Any,
    events: Any,
    layer: Any,
    tokens: Any,
    known: Any,
    busy: Any,
    ids: Any,
    predicted: Any,
    wanted: Any,
) -> Any:
    """Do what the fast engine does at an event's end (`sim.fast.kernel`), for `Decisions.look_ahead`; compiled there.

    `known` [keys] are records that say who is resident. Fill `wanted` [n, 2] with keys and events and return how many;
    `FAILED` where a policy raised, `WRONG` where it gave what cannot be.
    """
    rows, experts = len(predicted), len(ids)
    layers = len(known) // experts
    if table[OBSERVE] and call(table[OBSERVE], table[PREDICTOR], 0, 0, 0, 0) == FAILED:
        return FAILED
    most = call(table[MOST], table[PREFETCH], tokens, 0, 0, 0)
    if most == FAILED:
        return FAILED
    most = min(most, experts)
    count = 0
    for ahead in range(1, rows):
        target = now + ahead
        if target >= events:
            break
        found = call(table[PREDICT], table[PREDICTOR], ahead, most, 0, 0) if most >= 0 else most
        taken = call(table[TAKE], table[PREFETCH], found, 0, 0, 0) if found > 0 and table[TAKE] else found
        if found == FAILED or taken == FAILED:
            return FAILED
        if found < 0 or found > most or taken < 0 or taken > found:
            wanted[0, 0] = found if taken == found else taken
            return WRONG
        if found == 0:
            continue
        row = predicted[target % rows]
        row[experts] = True
        first_key = (layer + ahead) % layers * experts
        for index in range(taken):
            expert = ids[index]
            if expert < 0 or expert >= experts:
                wanted[0, 0] = expert
                return WRONG
            row[expert] = True
            key = first_key + expert
            if not known[key].resident and not busy[key]:
                busy[key] = True
                wanted[count, 0] = key
                wanted[count, 1] = target
                count += 1
    return count
