"""Streams and events of a device, as the executor uses them: the same calls on a GPU and on the CPU stand-in.

Work is submitted to one of two streams and runs there in order. A **ticket** is a place in a stream: a whole number that
grows, so that a ticket that is done says that everything before it in its stream is done too. Ticket 0 is always done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from real.schedule import Schedule

COMPUTE, COPY = 0, 1
"""The two streams: kernels; host-to-device copies of experts."""

STREAM_NAMES = ("compute stream", "copy stream")


class Memory(NamedTuple):
    """Where experts are, as addresses: expert k at ``experts + k * slot_bytes``, slot s at ``slots + s * slot_bytes``."""

    slots: int
    """On the device."""
    experts: int
    """In the host's memory."""
    slot_bytes: int


class Calls(NamedTuple):
    """Addresses of C functions for compiled code; they return 0, or what `Device.fail` knows."""

    memcpy: int
    """(target, source, bytes, stream)"""
    record: int
    """(event or mark, stream)"""
    copy_stream: int


class Device(ABC):
    """Two streams in order, and the host that submits to them; subclasses say how work runs.

    With a `schedule`, it is told every ticket and wait, so that it can prove the order of what is reported to it.
    """

    looks = 1
    """How often the host looks for what a kernel is to write before it does something else."""

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule
        self._recorded = [0, 0]
        """Last ticket of each stream."""
        self._known = [0, 0]
        """Last ticket of each stream that the host knows to be done."""

    @abstractmethod
    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Let `work` run on `stream` after all that was submitted to it."""

    def record(self, stream: int) -> int:
        """Mark what `stream` was given so far and return the ticket."""
        self._recorded[stream] = ticket = self._recorded[stream] + 1
        if self.schedule is not None:
            self.schedule.record(stream, ticket)
        self._record(stream, ticket)
        return ticket

    def recorded(self, stream: int) -> int:
        """Note that `next_event` was recorded by compiled code; return its ticket."""
        self._recorded[stream] = ticket = self._recorded[stream] + 1
        if self.schedule is not None:
            self.schedule.record(stream, ticket)
        return ticket

    def wait(self, stream: int, on: int, ticket: int) -> None:
        """Let what `stream` is given from now on run after `ticket` of the stream `on`; the host does not wait."""
        if ticket <= self._known[on]:
            return  # the host knows, so whatever it submits from now on comes after
        if self.schedule is not None:
            self.schedule.wait(stream, on, ticket)
        self._wait(stream, on, ticket)

    def done(self, stream: int, ticket: int) -> bool:
        """Return whether `ticket` is done; the host does not wait."""
        if ticket <= self._known[stream]:
            return True
        if not self._query(stream, ticket):
            return False
        self.saw(stream, ticket)
        return True

    def saw(self, stream: int, ticket: int) -> None:
        """Note that the host learnt in another way that `ticket` is done, by what a kernel wrote into its memory."""
        if ticket > self._known[stream]:
            self._known[stream] = ticket
            if self.schedule is not None:
                self.schedule.saw(stream, ticket)

    def synchronize(self, stream: int, ticket: int) -> None:
        """Let the host wait for `ticket`."""
        if ticket > self._known[stream]:
            self._synchronize(stream, ticket)
            self.saw(stream, ticket)

    def drain(self) -> None:
        """Let the host wait for everything."""
        for stream in (COPY, COMPUTE):
            self.synchronize(stream, self.record(stream))

    def idle(self) -> None:  # noqa: B027  # a GPU works on its own
        """Let the device work while the host looks out for what a kernel is to write."""

    def settle(self) -> None:  # noqa: B027
        """Let whatever torch is asked from now on come after all that the compute stream was given: on a GPU it does."""

    @abstractmethod
    def copy(self, target: int, source: int, size: int) -> None:
        """Submit a copy of `size` bytes from host memory to device memory to the copy stream; both are addresses."""

    @abstractmethod
    def calls(self) -> Calls:
        """Return what compiled code may call; the device keeps it alive."""

    @abstractmethod
    def next_event(self, stream: int) -> int:
        """Return the event that belongs to the stream's next ticket, for `Calls.record`."""

    @abstractmethod
    def fail(self, code: int) -> NoReturn:
        """Raise InputError for what one of `calls` returned."""

    def close(self) -> None:  # noqa: B027
        """Let go of the device."""

    def reserve_marks(self, count: int) -> None:  # noqa: B027
        """Prepare for `count` marks."""

    @abstractmethod
    def mark(self, stream: int) -> int:
        """Note the device's time at this place of `stream`; return a number for `mark_ns`."""

    @abstractmethod
    def open_mark(self) -> tuple[int, int]:
        """Return a mark that compiled code is to record, and what `Calls.record` is given for it."""

    @abstractmethod
    def drop_marks(self, count: int) -> None:
        """Forget the last `count` of `open_mark`, which were not recorded."""

    @abstractmethod
    def mark_ns(self, mark: int) -> int:
        """Return the ns of a mark, once the device is drained: on the host's clock (`time.perf_counter_ns`)."""

    @abstractmethod
    def _record(self, stream: int, ticket: int) -> None: ...

    @abstractmethod
    def _wait(self, stream: int, on: int, ticket: int) -> None: ...

    @abstractmethod
    def _query(self, stream: int, ticket: int) -> bool: ...

    @abstractmethod
    def _synchronize(self, stream: int, ticket: int) -> None: ...
