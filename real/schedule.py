"""Proof that slots are used in order: no slot is overwritten before its last reader ended, none is read before it is filled.

What counts is not when things happened to run but what is bound to have run before: two streams and the host are each a
sequence, and waits and observed tickets order them against each other (vector clocks). A schedule that is only lucky fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class SlotWrite(NamedTuple):
    """Bytes `start` to `stop` of the expert `key` are written into `slot`."""

    slot: int
    key: int
    start: int
    stop: int


class SlotRead(NamedTuple):
    """The expert `key` is read from `slot`."""

    slot: int
    key: int


class HazardError(AssertionError):
    """A slot is read or written without being ordered after what it depends on: a defect of the executor."""


class _Slot:
    """What happened to a slot last."""

    def __init__(self) -> None:
        self.key = -1
        self.filled = 0
        """Bytes of `key` written so far, from the front."""
        self.written = (0, 0)
        """Stream and position of the last write."""
        self.read: list[int] = [0, 0]
        """Position of the last read in each stream."""


class Schedule:
    """Recorder of everything that is submitted; raises HazardError at the first hazard. `expert_bytes` fill a slot."""

    def __init__(self, expert_bytes: int) -> None:
        self.expert_bytes = expert_bytes
        self.reads = self.writes = 0
        """How many were proved."""
        self._position = [0, 0]
        """How much was submitted to each stream."""
        self._after = [[0, 0], [0, 0]]
        """Per stream: up to which positions of both streams all has run before what comes next on it."""
        self._host = [0, 0]
        """The same for the host."""
        self._tickets: dict[tuple[int, int], list[int]] = {}
        self._slots: dict[int, _Slot] = {}

    def submit(self, stream: int, reads: Sequence[SlotRead], writes: Sequence[SlotWrite]) -> None:
        """Check work that is about to be submitted to `stream`."""
        before = [max(pair) for pair in zip(self._after[stream], self._host, strict=True)]
        self._after[stream] = before
        self._position[stream] += 1
        for slot, key in reads:
            self._check_read(stream, before, slot, key)
        for write in writes:
            self._check_write(stream, before, write)
        before[stream] = self._position[stream]

    def record(self, stream: int, ticket: int) -> None:
        """Remember what is done when `ticket` is."""
        self._tickets[stream, ticket] = list(self._after[stream])

    def wait(self, stream: int, on: int, ticket: int) -> None:
        """Order what comes next on `stream` after `ticket` of `on`."""
        done = self._tickets.get((on, ticket), [0, 0])
        self._after[stream] = [max(pair) for pair in zip(self._after[stream], done, strict=True)]

    def saw(self, stream: int, ticket: int) -> None:
        """Order all that the host submits from now on after `ticket`."""
        self._host = [max(pair) for pair in zip(self._host, self._tickets[stream, ticket], strict=True)]

    def _check_read(self, stream: int, before: Sequence[int], number: int, key: int) -> None:
        slot = self._slots.setdefault(number, _Slot())
        if slot.key != key or slot.filled < self.expert_bytes:
            raise HazardError(
                f"slot {number} is read for expert {key}, but holds {slot.filled} of {self.expert_bytes} bytes of expert "
                f"{slot.key}"
            )
        wrote, position = slot.written
        if position > before[wrote]:
            raise HazardError(f"slot {number} is read for expert {key} before it is filled")
        slot.read[stream] = self._position[stream]
        self.reads += 1

    def _check_write(self, stream: int, before: Sequence[int], write: SlotWrite) -> None:
        slot = self._slots.setdefault(write.slot, _Slot())
        if any(position > done for position, done in zip(slot.read, before, strict=True)):
            raise HazardError(f"slot {write.slot} is overwritten with expert {write.key} before its last reader ended")
        wrote, position = slot.written
        if position > before[wrote]:
            raise HazardError(f"slot {write.slot} is overwritten with expert {write.key} while it is being written")
        if write.start not in (0, slot.filled) or (write.start and slot.key != write.key):
            raise HazardError(
                f"slot {write.slot} gets byte {write.start} of expert {write.key} after {slot.filled} of {slot.key}"
            )
        slot.key, slot.filled = write.key, write.stop
        slot.written = (stream, self._position[stream])
        self.writes += 1
