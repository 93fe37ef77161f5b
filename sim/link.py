"""The host-to-device link: one transfer at a time, demand before prefetch, first come first served in a class.

A server with two queues and a callback, not a process per transfer: that is what makes SimPy fast enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from simpy.events import Timeout

from sim.costs import Costs


class Transfer:
    """One expert on its way, or waiting for it."""

    __slots__ = ("chunks_left", "chunks_moved", "demand", "key", "refresh", "started", "target")

    def __init__(self, key: int, target: int, chunks: int, *, demand: bool = False, refresh: bool = False) -> None:
        self.key = key
        self.target = target
        """The event that is to use the expert."""
        self.demand = demand
        """Whether an event waits for it; a prefetch becomes a demand when its event comes first."""
        self.refresh = refresh
        """Whether it renews the copy of an expert that already holds a slot."""
        self.started = False
        """Whether it holds its slot: from its first chunk on."""
        self.chunks_left = chunks
        self.chunks_moved = 0


class Link:
    """Serial link of a simulated device; `env` is a SimPy environment whose clock counts whole nanoseconds.

    `start(transfer)` is asked when a transfer is about to move its first chunk; it reserves the slot and returns whether
    there is one (a demand is always given one). `landed(transfer)` is told when its last chunk arrived, `pause(transfer)`
    when a prefetch gives way to a demand at a chunk's end; it returns whether the prefetch is to go on later.
    """

    def __init__(
        self,
        env: Any,
        costs: Costs,
        start: Callable[[Transfer], bool],
        landed: Callable[[Transfer], None],
        pause: Callable[[Transfer], bool],
    ) -> None:
        self.env = env
        self.chunks = costs.chunks
        self.chunk_ns = costs.chunk_ns
        self.last_chunk_ns = costs.last_chunk_ns
        self._start, self._landed, self._pause = start, landed, pause
        self.demand: deque[Transfer] = deque()
        self.prefetch: deque[Transfer] = deque()
        self.moving: Transfer | None = None
        """The transfer that the link is busy with."""
        self.busy_ns = 0
        """Time spent moving bytes, counted when a transfer ends or pauses."""
        self.moving_since = 0
        self._alarm: Timeout | None = None
        """The timeout that counts; older ones were overtaken by a pause."""

    def submit_demand(self, transfer: Transfer) -> None:
        """Queue a demand load; a prefetch on the link gives way at the end of its chunk."""
        self.demand.append(transfer)
        if self.moving is None:
            self._serve()
        elif not self.moving.demand:
            self._ask_to_give_way(self.moving)

    def submit_prefetch(self, transfer: Transfer) -> None:
        """Queue a prefetch."""
        self.prefetch.append(transfer)
        if self.moving is None:
            self._serve()

    def promote(self, transfer: Transfer) -> None:
        """Turn a prefetch, queued or on the link, into a demand; what has moved is kept."""
        transfer.demand = True
        if transfer is not self.moving:
            self.prefetch.remove(transfer)
            self.submit_demand(transfer)

    def drop_prefetches(self, is_stale: Callable[[Transfer], bool]) -> list[Transfer]:
        """Take the stale prefetches, paused ones included, out of the queue and return them."""
        stale = [transfer for transfer in self.prefetch if is_stale(transfer)]
        if stale:
            self.prefetch = deque(transfer for transfer in self.prefetch if transfer not in stale)
        return stale

    def _serve(self) -> None:
        """Start the next transfer, if there is one that gets a slot."""
        while self.demand or self.prefetch:
            transfer = (self.demand or self.prefetch).popleft()
            if transfer.started or self._start(transfer):
                transfer.started = True
                self.moving = transfer
                self.moving_since = self.env.now
                rest_ns = (transfer.chunks_left - 1) * self.chunk_ns + self.last_chunk_ns
                self._alarm = alarm = Timeout(self.env, rest_ns)  # as _call_after, in the one place where it counts
                alarm.callbacks.append(self._end)
                return
        self.moving = None

    def _ask_to_give_way(self, transfer: Transfer) -> None:
        """Let a prefetch stop at the end of the chunk that is moving, unless that is its last."""
        if self.chunk_ns == 0:
            return
        elapsed = self.env.now - self.moving_since
        chunks = max(1, -(-elapsed // self.chunk_ns))
        if chunks < transfer.chunks_left:
            self._call_after(self.moving_since + chunks * self.chunk_ns - self.env.now, self._give_way)

    def _give_way(self, alarm: Any) -> None:
        """Pause the prefetch on the link at a chunk's end, if a demand is still waiting."""
        transfer = self.moving
        if alarm is not self._alarm or transfer is None:
            return
        elapsed = self.env.now - self.moving_since
        chunks = elapsed // self.chunk_ns
        if transfer.demand or not self.demand:  # promoted meanwhile: go on to the end
            self._call_after((transfer.chunks_left - 1 - chunks) * self.chunk_ns + self.last_chunk_ns, self._end)
            return
        self.busy_ns += elapsed
        transfer.chunks_left -= chunks
        transfer.chunks_moved += chunks
        if self._pause(transfer):
            self.prefetch.appendleft(transfer)
        self._serve()

    def _end(self, alarm: Any) -> None:
        """Hand over the transfer whose last chunk arrived."""
        transfer = self.moving
        if alarm is not self._alarm or transfer is None:
            return
        self.busy_ns += self.env.now - self.moving_since
        transfer.chunks_moved += transfer.chunks_left
        transfer.chunks_left = 0
        self.moving = None
        self._landed(transfer)
        if self.moving is None and (self.demand or self.prefetch):
            self._serve()

    def _call_after(self, delay: int, callback: Callable[[Any], None]) -> None:
        """Arrange for the one callback that counts from now on."""
        self._alarm = alarm = Timeout(self.env, delay)
        alarm.callbacks.append(callback)
