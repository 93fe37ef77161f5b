"""Policies that run in Python while the engine's loop is compiled: what numba cannot compile, or a debugger should see."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from policies.contract import Seen, Setting
from policies.residency import Residency
from sim.fast.native import FAILED, PARAMETERS

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (1 + PARAMETERS))


def callback(function: Callable[..., Any], wanted: int, faults: list[BaseException]) -> tuple[int, Any]:
    """Return the address at which compiled code can call `function`, and what must be kept alive for it.

    `function` takes the first `wanted` of the four numbers. What it raises is put into `faults`, and the caller is
    told that it failed.
    """

    def guarded(state: int, *numbers: int) -> int:
        try:
            return int(function(*numbers[:wanted]) or 0)
        except BaseException as fault:
            faults.append(fault)
            return FAILED

    pointer = _FUNCTION(guarded)
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0, pointer


class PythonEviction:
    """An eviction policy, called back. The loop checks its victims; for one that scores the residents are kept here."""

    def __init__(self, policy: Any, setting: Setting, told: Any) -> None:
        self.holds = memoryview(told.holds)  # written by the loop
        self.hits, self.misses = memoryview(told.hits), memoryview(told.misses)
        self.resident = told.resident
        residency = Residency(policy, setting)
        residency.holds = self.holds  # type: ignore[assignment]
        policy = residency.eviction
        self.on_hit, self.on_miss = policy.on_hit, getattr(policy, "on_miss", None)
        self.on_insert, self.on_evict = policy.on_insert, policy.on_evict
        self.victim = getattr(policy, "victim", None)
        self.residency = residency

    def event(self, hits: int, misses: int, pool: int, now: int) -> None:
        """Tell which experts of an event are there and which are not."""
        on_hit, on_miss = self.on_hit, self.on_miss
        for key in self.hits[:hits].tolist():
            on_hit(key, pool, now)
        if on_miss is not None:
            for key in self.misses[:misses].tolist():
                on_miss(key, pool, now)

    def admit(self, key: int, pool: int, limit: int, now: int) -> int:
        """Give `key` a slot: a free one (limit -1), or one whose resident is held below `limit`; return who left."""
        if self.victim is None:
            return self._admit_by_score(key, pool, limit, now)
        leaving: int = -1
        if limit >= 0:
            leaving = self.victim(pool, self.holds, limit, now)
            if leaving < 0:
                return -2
            if leaving >= len(self.holds) or not self.resident[leaving] or self.holds[leaving] >= limit:
                return leaving  # it may not leave: the loop sees to it
            self.on_evict(leaving, pool, now)
        self.on_insert(key, pool, now)
        return leaving

    def _admit_by_score(self, key: int, pool: int, limit: int, now: int) -> int:
        leaving = -1
        if limit >= 0:
            leaving = self.residency.victim(pool, now, limit)
            if leaving < 0:
                return -2
            self.residency.evict(leaving, now)
        self.residency.insert(key, now)
        return leaving

    def evicted(self, key: int, pool: int, now: int) -> None:
        """Tell that `key` lost its slot for another reason than to make room."""
        if self.victim is None:
            self.residency.evict(key, now)
        else:
            self.on_evict(key, pool, now)


class PythonPredictor:
    """A predictor, called back."""

    def __init__(self, policy: Any, told: Any) -> None:
        self.policy, self.told = policy, told
        self.observed: Any = None

    def show(self, observed: Any) -> None:
        """Take the rows of the next part of the run."""
        self.observed = observed

    def observe(self) -> None:
        """Let the predictor learn from the running event."""
        self.policy.observe(self._seen())

    def predict(self, ahead: int, most: int) -> int:
        """Let the predictor write up to `most` experts expected `ahead` layers later; return how many."""
        count: int = self.policy.predict(self._seen(), ahead, self.told.ids[:most], self.told.scores[:most])
        return count

    def _seen(self) -> Seen:
        now, layer, start, stop = self.told.seen.tolist()
        request = self.observed.request[start:stop]
        rows: list[Any]
        rows = [array[start:stop, layer] if array.ndim > 1 else None for array in self.observed]
        return Seen(now, layer, rows[0], rows[1], request, *rows[3:])
