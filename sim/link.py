"""The host-to-device link: one transfer at a time, demand before prefetch, first come first served in a class.

A server with two queues and a callback, not a process per transfer: that is what makes SimPy fast enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from simpy.events import URGENT, Event

from sim.costs import Costs, demand_times


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

    `start(transfer, ns)` is asked when a transfer is about to move its first chunk at `ns`; it reserves the slot and returns
    whether there is one (a demand is always given one). `landed(transfer, ns)` is told that its last chunk arrived at `ns`.
    `pause(transfer)` is asked when a prefetch gives way to a demand at a chunk's end, and returns whether it is to go on.
    `moved(key, start_ns, end_ns)`, if given, is told when the link was busy with what.
    """

    def __init__(
        self,
        env: Any,
        costs: Costs,
        start: Callable[[Transfer, int], bool],
        landed: Callable[[Transfer, int], None],
        pause: Callable[[Transfer], bool],
        moved: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self.env = env
        self.chunks = costs.chunks
        self.chunk_ns = costs.chunk_ns
        self.last_chunk_ns = costs.last_chunk_ns
        self.demand_ns = demand_times(costs)
        self.committed_chunks = costs.committed_chunks
        self.start_ns = costs.link_start_ns
        self._start, self._landed, self._pause, self._moved = start, landed, pause, moved
        self.demand: deque[Transfer] = deque()
        self.prefetch: deque[Transfer] = deque()
        self.train: list[tuple[int, Transfer]] = []
        """Demands that are being served in a row, with the time at which each lands."""
        self.moving: Transfer | None = None
        """The transfer that the link is busy with; of a train the last."""
        self.busy_ns = 0
        """Time spent moving bytes, counted when a transfer ends or pauses."""
        self.moving_since = 0
        """When the chunks of what moves began to follow one another; an idle link needs `start_ns` before."""
        self.woken = 0
        """When the link began to be busy with what moves."""
        self.free_since = -1
        """When the link last ended a transfer, or let it pause."""
        self._alarm: _Alarm | None = None
        """The alarm that counts; older ones were overtaken by a pause."""

    def go(self) -> None:
        """Serve what was put into the queues; a prefetch on the link gives way to a demand at the end of its chunk."""
        if self.moving is None:
            self._serve()
        elif self.demand and not self.moving.demand:
            self._ask_to_give_way(self.moving)

    def promote(self, transfer: Transfer) -> None:
        """Turn a prefetch, queued or on the link, into a demand; what has moved is kept."""
        transfer.demand = True
        if transfer is not self.moving:
            self.prefetch.remove(transfer)
            self.demand.append(transfer)

    def _serve(self) -> None:
        """Start what comes next: all demands in a row, or the first prefetch that gets a slot."""
        if self.demand:
            self._serve_demands()
            return
        while self.prefetch:
            transfer = self.prefetch.popleft()
            if transfer.started or self._start(transfer, self.env.now):
                transfer.started = True
                self.moving = transfer
                start_ns = self._wake()
                self._call_after(start_ns + (transfer.chunks_left - 1) * self.chunk_ns + self.last_chunk_ns, self._end)
                return

    def _wake(self) -> int:
        """Note that the link moves from now on; return what the first chunk takes longer if it was idle before."""
        self.woken = self.env.now
        start_ns = 0 if self.free_since == self.env.now else self.start_ns
        self.busy_ns += start_ns
        self.moving_since = self.env.now + start_ns
        return start_ns

    def _serve_demands(self) -> None:
        """Serve the waiting demands as one train.

        Nothing interrupts them, and all that could change a slot meanwhile waits for them, so each starts when the one
        before it ends: one event at the end of the train instead of one per transfer.
        """
        starts = now = self.env.now
        now += self._wake()
        for transfer in self.demand:
            if not transfer.started:
                self._start(transfer, starts)
                transfer.started = True
            now += self.demand_ns[transfer.chunks_left]
            starts = now
            self.train.append((now, transfer))
        self.demand.clear()
        self.moving = transfer
        self._call_after(now - self.env.now, self._end_train)

    def _end_train(self, alarm: Any) -> None:
        """Hand over the demands of a train."""
        self.busy_ns += self.env.now - self.moving_since
        self.free_since = self.env.now
        train, self.train, self.moving = self.train, [], None
        if self._moved is not None:
            for landed_ns, transfer in train:
                self._moved(transfer.key, self.woken, landed_ns)
                self.woken = landed_ns
        for landed_ns, transfer in train:
            self._landed(transfer, landed_ns)
        self._serve()

    def _ask_to_give_way(self, transfer: Transfer) -> None:
        """Let a prefetch stop at the end of what the copy engine was given of it, unless that ends it."""
        if self.chunk_ns == 0:
            return
        elapsed = self.env.now - self.moving_since
        chunks = max(1, -(-elapsed // self.chunk_ns)) + self.committed_chunks
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
        self.free_since = self.env.now
        self.tell()
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
        self.free_since = self.env.now
        self.tell()
        self.moving = None
        self._landed(transfer, self.env.now)
        self._serve()

    def tell(self) -> None:
        """Say how long the link has been busy with what moves."""
        if self._moved is not None and self.moving is not None:
            self._moved(self.moving.key, self.woken, self.env.now)

    def _call_after(self, delay: int, callback: Callable[[Any], None]) -> None:
        """Arrange for the one callback that counts from now on."""
        self._alarm = _Alarm(self.env, delay, callback)


class _Alarm(Event):
    """A callback after a delay, before all else that happens at that instant: what lands when an event starts is there."""

    def __init__(self, env: Any, delay: int, callback: Callable[[Any], None]) -> None:
        self.env = env
        self.callbacks = [callback]
        self._ok = True
        self._value = None
        env.schedule(self, URGENT, delay)
