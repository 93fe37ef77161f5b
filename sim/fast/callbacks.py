"""Policies that run in Python while the engine's loop is compiled: what numba cannot compile, or a debugger should see."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from policies.contract import Seen, Setting
from policies.residency import FREE, HELD, Residency
from sim.fast.native import FAILED, PARAMETERS

NOBODY = -1
"""Who left where there was a free slot."""

WRONG = -1
"""What the entry `admit` returns when the policy chose somebody who may not leave."""

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
    """An eviction policy, called back. For one that scores the residents are kept here."""

    def __init__(self, policy: Any, setting: Setting, told: Any) -> None:
        # Written by the loop; memory views, since they are read one number at a time.
        self.holds, self.resident = memoryview(told.holds), memoryview(told.experts["resident"])
        self.hits, self.misses = memoryview(told.hits), memoryview(told.misses)
        self.demands, self.left, self.room = memoryview(told.demands), memoryview(told.left), memoryview(told.room)
        self.residency = residency = Residency(policy, setting)
        residency.holds = self.holds  # type: ignore[assignment]
        policy = residency.eviction
        self.on_hit, self.on_miss = policy.on_hit, getattr(policy, "on_miss", None)
        self.on_insert, self.on_evict = policy.on_insert, policy.on_evict
        self.victim: Any = getattr(policy, "victim", None)
        if self.victim is None:
            self.on_insert = lambda key, pool, now: residency.insert(key, now)
            self.on_evict = lambda key, pool, now: residency.evict(key, now)
            self.victim = lambda pool, holds, limit, now: residency.victim(pool, now, limit)

    def event(self, hits: int, misses: int, pool: int, now: int) -> None:
        """Tell which experts of an event are there and which are not."""
        on_hit, on_miss = self.on_hit, self.on_miss
        for key in self.hits[:hits].tolist():
            on_hit(key, pool, now)
        if on_miss is not None:
            for key in self.misses[:misses].tolist():
                on_miss(key, pool, now)

    def admit(self, first: int, stop: int, pool: int, now: int) -> int:
        """Give waiting experts a slot each: what `sim.fast.hooks.admit` says."""
        holds, resident, left = self.holds, self.resident, self.left
        free, highest = self.room
        for index, key in enumerate(self.demands[first:stop].tolist(), first):
            leaving = NOBODY
            if resident[key]:
                continue
            if free > 0:
                free -= 1
            else:
                limit = FREE
                while leaving < 0 and limit < highest:
                    limit += 1
                    leaving = self.victim(pool, holds, limit, now)
                if leaving < 0:
                    return index
                if leaving >= len(holds) or holds[leaving] >= limit:
                    self.room[0] = leaving
                    return WRONG
                self.on_evict(leaving, pool, now)
                holds[leaving] = HELD
            self.on_insert(key, pool, now)
            left[index] = leaving
        return stop

    def evicted(self, key: int, pool: int, now: int) -> None:
        """Tell that `key` lost its slot for another reason than to make room."""
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
        seen = self._seen()
        count: int = self.policy.predict(seen, ahead, self.told.ids[:most], self.told.scores[:most])
        return count

    def _seen(self) -> Seen:
        now, layer, first, last, first_float = self.told.seen.tolist()
        observed, rows, floats = self.observed, slice(first, last), slice(first_float, first_float + last - first)
        return Seen(
            now,
            layer,
            observed.experts[rows, layer],
            observed.weights[floats, layer],
            observed.request[rows],
            observed.lookahead_experts[rows, layer],
            observed.lookahead_scores[floats, layer],
            observed.router_logits[floats, layer],
        )
