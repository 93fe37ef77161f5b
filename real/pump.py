"""The link pump: one copy stream fed from two queues, so that a demand never stands behind all that was prefetched.

A GPU's copy engine serves what it was given in order and cannot be told to put something aside. So prefetches are kept here
and given to it a chunk at a time, at most `window_bytes` ahead; demands are given to it at once. It runs on the host thread,
whenever that has a moment (`go`). Nothing can call a demand back, so it crosses in one copy, whatever is left of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from real.device import COPY, Device


class Transfer:
    """One expert on its way, or waiting for it."""

    __slots__ = ("demand", "key", "refresh", "sent", "slot", "started", "target", "ticket")

    def __init__(self, key: int, target: int, *, demand: bool = False, refresh: bool = False) -> None:
        self.key = key
        self.target = target
        """The event that is to use the expert."""
        self.demand = demand
        """Whether an event waits for it; a prefetch becomes a demand when its event comes first."""
        self.refresh = refresh
        """Whether it renews the copy of an expert that already holds a slot."""
        self.started = False
        """Whether it holds its slot: from its first chunk on."""
        self.sent = 0
        """Bytes given to the copy stream so far."""
        self.slot = -1
        self.ticket = 0
        """Of its last chunk, once that is given to the copy stream."""


class Pump:
    """Feeds the copy stream of `device` with experts of `expert_bytes`, prefetches in copies of at most `chunk_bytes`.

    `start(transfer)` is asked when the first chunk is about to go; it reserves the slot and returns whether there is one (a
    demand always gets one). `copy(transfer, start, stop)` submits the copy of those bytes. `landed(transfer)` is told when
    the host finds out that the last chunk arrived.
    """

    def __init__(
        self,
        device: Device,
        expert_bytes: int,
        chunk_bytes: int,
        window_bytes: int,
        start: Callable[[Transfer], bool],
        copy: Callable[[Transfer, int, int], None],
        landed: Callable[[Transfer], None],
    ) -> None:
        self.device = device
        self.expert_bytes = expert_bytes
        self.chunk_bytes = min(chunk_bytes, expert_bytes)
        self.window_bytes = window_bytes
        self._start, self._copy, self._landed = start, copy, landed
        self.demand: deque[Transfer] = deque()
        self.prefetch: deque[Transfer] = deque()
        """Prefetches that the copy stream was not given whole."""
        self.in_flight: deque[tuple[int, int, Transfer | None]] = deque()
        """(ticket, bytes that count as sent ahead, the transfer that ends with it) of all that the copy stream was given."""
        self.ahead_bytes = 0
        """Bytes of prefetches that the copy stream was given and that have not landed; demands before them do not count."""
        self.bytes_sent = 0
        """All bytes ever given to the copy stream."""

    def go(self) -> None:
        """Give the copy stream all demands, and prefetches up to the window."""
        self.poll()
        self.send_demands()
        while self.prefetch and self.ahead_bytes < self.window_bytes:
            transfer = self.prefetch.popleft()
            if not transfer.started:
                if not self._start(transfer):
                    continue
                transfer.started = True
            self._send(transfer, self.chunk_bytes)
            if transfer.sent < self.expert_bytes:
                self.prefetch.appendleft(transfer)

    def send_demand(self) -> None:
        """Give the copy stream the first demand, if there is one."""
        if self.demand:
            transfer = self.demand.popleft()
            if not transfer.started:
                self._start(transfer)
                transfer.started = True
            self._send(transfer, self.expert_bytes)

    def send_demands(self) -> None:
        """Give the copy stream all demands."""
        while self.demand:
            self.send_demand()

    def promote(self, transfer: Transfer) -> None:
        """Turn a prefetch into a demand; what was sent is kept."""
        transfer.demand = True
        if transfer.sent < self.expert_bytes:
            self.prefetch.remove(transfer)
            self.demand.append(transfer)

    def poll(self) -> None:
        """Find out what has landed."""
        in_flight, device = self.in_flight, self.device
        while in_flight and device.done(COPY, in_flight[0][0]):
            _, size, transfer = in_flight.popleft()
            self.ahead_bytes -= size
            if transfer is not None:
                self._landed(transfer)

    def await_oldest(self) -> None:
        """Let the host wait until the oldest chunk has landed."""
        self.device.synchronize(COPY, self.in_flight[0][0])
        self.poll()

    def _send(self, transfer: Transfer, most: int) -> None:
        """Send the next bytes of a transfer, at most so many."""
        start = transfer.sent
        stop = min(start + most, self.expert_bytes)
        self._copy(transfer, start, stop)
        self._sent(transfer, start, stop, self.device.record(COPY))

    def note_sent(self, transfer: Transfer, ticket: int) -> None:
        """Note a demand that was given to the copy stream whole, `ticket` behind it."""
        transfer.started = True
        self._sent(transfer, 0, self.expert_bytes, ticket)

    def _sent(self, transfer: Transfer, start: int, stop: int, ticket: int) -> None:
        transfer.sent = stop
        last = stop == self.expert_bytes
        if last:
            transfer.ticket = ticket
        ahead = 0 if transfer.demand else stop - start
        self.in_flight.append((ticket, ahead, transfer if last else None))
        self.ahead_bytes += ahead
        self.bytes_sent += stop - start
