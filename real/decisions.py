"""The policies of a system as the executor calls them: compiled once, called by address, as in the fast engine.

A call costs the host about a microsecond; the same methods in Python cost up to eighty for one victim, while the link stands
still. What numba cannot compile is called back in Python: nobody here knows which.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from policies.residency import ContractError, no_victim
from policies.system import System
from sim.fast.callbacks import WRONG
from sim.fast.hooks import (
    ADMIT,
    EVENT,
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
from sim.fast.native import FAILED, PARAMETERS
from sim.fast.observed import Observed
from sim.fast.run import PolicyRaised
from sim.fast.state import EXPERT
from sim.observations import Observations
from sim.workload import Workload

REFUSED = -2
"""What `Decisions.admit` returns where nobody may leave."""

_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (1 + PARAMETERS))


class Decisions:
    """The policies of a freshly built `system`; predictors see rows ``rows(step)`` (first, last + 1) of `observed`."""

    def __init__(self, system: System, observed: Observed, rows: Callable[[int], tuple[int, int]]) -> None:
        self.system = system
        self._rows = rows
        told = self._told = make_told(system.setting, np.zeros(system.setting.keys, EXPERT))
        self.resident = memoryview(told.experts["resident"])
        """[keys] who holds a slot; the executor writes it."""
        self.holds = memoryview(told.holds)
        """[keys] how firmly; the executor writes it, and whoever has no slot stays HELD."""
        self._hits, self._misses, self._seen = memoryview(told.hits), memoryview(told.misses), memoryview(told.seen)
        self._demands, self._left, self._room = memoryview(told.demands), memoryview(told.left), memoryview(told.room)
        self._hooks = Hooks(system, told)
        self._hooks.observe(observed)
        self._observed = observed
        table = self._hooks.table
        self._eviction, self._predictor, self._prefetch = (int(table[place]) for place in (EVICTION, PREDICTOR, PREFETCH))
        self._event, self._admit, self._evicted = (_ENTRY(int(table[place])) for place in (EVENT, ADMIT, EVICTED))
        self._observe, self._most, self._predict, self._take = (
            _ENTRY(int(table[place])) if table[place] else None for place in (OBSERVE, MOST, PREDICT, TAKE)
        )

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
        return cls(system, Observed(*map(np.ascontiguousarray, observed)), seen.rows)

    def judged(self, hits: list[int], misses: list[int], pool: int, now: int) -> None:
        """Tell which experts of event `now` are there and which are not."""
        for place, key in enumerate(hits):
            self._hits[place] = key
        for place, key in enumerate(misses):
            self._misses[place] = key
        if self._event(self._eviction, len(hits), len(misses), pool, now) == FAILED:
            self._raise()

    def admit(self, key: int, pool: int, free: int, limit: int, now: int) -> int:
        """Give `key` one of `free` slots, or that of somebody held below `limit` where there is none.

        Return who left; NOBODY where nobody had to, REFUSED where nobody may. Raises ContractError for a wrong victim.
        """
        self._demands[0], self._room[0], self._room[1] = key, free, limit
        admitted = self._admit(self._eviction, 0, 1, pool, now)
        if admitted == FAILED:
            self._raise()
        if admitted == WRONG:
            raise ContractError(no_victim(type(self.system.eviction).__name__, self._room[0]))
        leaving: int = self._left[0] if admitted else REFUSED
        return leaving

    def evicted(self, key: int, pool: int, now: int) -> None:
        """Tell that `key` lost its slot for another reason than to make room."""
        if self._evicted(self._eviction, key, pool, now, 0) == FAILED:
            self._raise()

    def observe(self, step: int, layer: int, now: int) -> int:
        """Let the predictor learn from event `now`; return how many experts the prefetch rule would take at most."""
        first, last = self._rows(step)
        for place, number in enumerate((now, layer, first, last, first)):
            self._seen[place] = number
        if self._observe is not None and self._observe(self._predictor, 0, 0, 0, 0) == FAILED:
            self._raise()
        assert self._most is not None
        most: int = self._most(self._prefetch, last - first, 0, 0, 0)
        if most == FAILED:
            self._raise()
        return most

    def predict(self, ahead: int, most: int) -> tuple[int, int]:
        """Return how many experts the predictor expects `ahead` layers on, at most `most`, and how many of them to fetch."""
        assert self._predict is not None
        predicted: int = self._predict(self._predictor, ahead, most, 0, 0)
        taken = predicted
        if predicted > 0 and self._take is not None:
            taken = self._take(self._prefetch, predicted, 0, 0, 0)
        if FAILED in (predicted, taken):
            self._raise()
        return predicted, taken

    def predicted_ids(self, count: int) -> list[int]:
        """Return the first `count` experts of the last prediction."""
        ids: list[int] = self._told.ids[:count].tolist()
        return ids

    def _raise(self) -> None:
        if self._hooks.faults:
            raise self._hooks.faults[0]
        raise PolicyRaised("a compiled policy raised an exception; the reference engine (engine=reference) tells which")
