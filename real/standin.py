"""A device for machines without a GPU: work really happens later, in an order that a seeded scheduler chooses.

Nothing runs when it is submitted unless the scheduler says so; only what streams, waits and tickets order is in order. Code
that forgets a wait computes with what happens to lie in the slot.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from real.device import COMPUTE, COPY, STREAM_NAMES, Calls, Device
from real.schedule import Schedule
from traces.errors import InputError

PACES = ("eager", "lazy", "random")
"""When work runs: as soon as it can; not before somebody waits for it; by chance."""

_MEMCPY = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)
_RECORD = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 2)

_Item = int | tuple[int, int] | Callable[[], None]
"""A ticket, a wait for (stream, ticket), or work."""


class StandIn(Device):
    """Two streams in memory. `pace` is one of `PACES`, `copies` that of the copy stream if it differs.

    `fail_at_copy` makes that copy (counted from 1) fail, as a broken link would; InputError then says so.
    """

    def __init__(
        self,
        pace: str = "random",
        *,
        copies: str | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        fail_at_copy: int = 0,
    ) -> None:
        super().__init__(schedule)
        self._pace = (pace, copies or pace)
        self._random = random.Random(seed)
        self._queue: tuple[deque[_Item], deque[_Item]] = (deque(), deque())
        self._executed = [0, 0]
        self._marks: list[int] = []
        self._copies = 0
        self._fail_at_copy = fail_at_copy
        self._faults: list[BaseException] = []
        """What was raised while compiled code called."""
        self._c_functions = _MEMCPY(self._memcpy_called), _RECORD(self._record_called)

    def idle(self) -> None:
        """Run at least the next piece of the compute stream, which the host is waiting for."""
        if not self._queue[COMPUTE]:
            raise RuntimeError("the host waits for something that was never submitted")
        self._drift()
        if self._queue[COMPUTE]:
            self._step(COMPUTE)

    def settle(self) -> None:
        """Run the compute stream to its end, and of the copy stream what that has to wait for."""
        while self._queue[COMPUTE]:
            self._step(COMPUTE)

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy between two addresses."""
        self.submit(COPY, lambda: _move(target, source, size))

    def calls(self) -> Calls:
        """Return functions that queue what compiled code wants done."""
        memcpy, record = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._c_functions)
        return Calls(memcpy, record, COPY)

    def next_event(self, stream: int) -> int:
        """Return the stream's next ticket."""
        return self._recorded[stream] + 1

    def fail(self, code: int) -> NoReturn:
        """Raise what happened while compiled code called."""
        raise self._faults[0]

    def mark(self, stream: int) -> int:
        """Note the time at this place of `stream`."""
        mark, _ = self.open_mark()
        self._queue_mark(stream, mark)
        return mark

    def open_mark(self) -> tuple[int, int]:
        """Return a mark that is still to be recorded; as an event it is a negative number."""
        self._marks.append(0)
        return len(self._marks) - 1, -len(self._marks)

    def drop_marks(self, count: int) -> None:
        """Forget the last marks."""
        del self._marks[len(self._marks) - count :]

    def mark_ns(self, mark: int) -> int:
        """Return the ns of a mark."""
        return self._marks[mark]

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Queue `work`."""
        if stream == COPY:
            self._copies += 1
            if self._copies == self._fail_at_copy:
                work = _fail
        self._queue[stream].append(work)
        self._drift()

    def _record(self, stream: int, ticket: int) -> None:
        self._queue[stream].append(ticket)
        self._drift()

    def _wait(self, stream: int, on: int, ticket: int) -> None:
        self._queue[stream].append((on, ticket))

    def _query(self, stream: int, ticket: int) -> bool:
        self._drift()
        return self._executed[stream] >= ticket

    def _synchronize(self, stream: int, ticket: int) -> None:
        while self._executed[stream] < ticket:
            self._step(stream)

    def _queue_mark(self, stream: int, mark: int) -> None:
        def note() -> None:
            self._marks[mark] = time.perf_counter_ns()

        self._queue[stream].append(note)

    def _memcpy_called(self, target: int, source: int, size: int, stream: int) -> int:
        return self._guarded(lambda: self.copy(target, source, size))

    def _record_called(self, event: int, stream: int) -> int:
        return self._guarded(lambda: self._queue_mark(stream, -event - 1) if event < 0 else self._record(stream, event))

    def _guarded(self, what: Callable[[], None]) -> int:
        try:
            what()
        except BaseException as fault:
            self._faults.append(fault)
            return 1
        return 0

    def _drift(self) -> None:
        """Let the streams run on, as far as the pace has it."""
        for stream in (COPY, COMPUTE):
            pace, queue = self._pace[stream], self._queue[stream]
            while queue and (pace == "eager" or (pace == "random" and self._random.random() < 0.6)):
                self._step(stream)

    def _step(self, stream: int) -> None:
        """Run the next piece of `stream`, and first whatever it has to wait for."""
        if not self._queue[stream]:
            raise RuntimeError(f"somebody waits for what the {STREAM_NAMES[stream]} was never given")
        item = self._queue[stream].popleft()
        if isinstance(item, int):
            self._executed[stream] = item
        elif isinstance(item, tuple):
            self._synchronize(*item)
        else:
            item()


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


def _fail() -> None:
    raise InputError("a host-to-device copy failed: the link of the stand-in was told to break")
