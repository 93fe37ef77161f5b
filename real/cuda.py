"""An NVIDIA GPU as the executor's device: torch's streams; copies and events by the driver's own, quicker calls."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NoReturn

import torch

from real.device import COMPUTE, COPY, Calls, Device
from real.schedule import Schedule
from traces.errors import InputError

_NOT_READY = 600
"""What the driver answers about an event that is still to come."""

RING = 4096
"""Events that are reused in turn; a ticket whose event is needed again must be done."""


class Cuda(Device):
    """Two streams of the current GPU; the compute stream is torch's current stream until `close`."""

    looks = 2048

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__(schedule)
        torch.cuda.synchronize()  # what was allocated and filled on other streams is there
        self._driver = driver = _driver()
        self._memcpy, self._record_event = driver.cuMemcpyHtoDAsync_v2, driver.cuEventRecord
        self._wait_event, self._query_event = driver.cuStreamWaitEvent, driver.cuEventQuery
        self._before = torch.cuda.current_stream()
        self._streams = _streams()
        self._handles: tuple[int, int] = (self._streams[COMPUTE].cuda_stream, self._streams[COPY].cuda_stream)
        torch.cuda.set_stream(self._streams[COMPUTE])
        self._ring = tuple([_event() for _ in range(RING)] for _ in range(2))
        self._marks: list[int] = []
        self._spare_marks: list[int] = []
        self._times: list[int] = []
        """The ns of all marks, once the device is closed."""
        self._base = _event(timing=True)
        _check(self._record_event(self._base, self._handles[COMPUTE]))
        _check(driver.cuEventSynchronize(self._base))
        self._base_ns = time.perf_counter_ns()

    def close(self) -> None:
        """Give torch its stream back."""
        torch.cuda.set_stream(self._before)
        with suppress(InputError):  # a device that is lost knows no times
            self._times = [self.mark_ns(mark) for mark in range(len(self._marks))]
        for event in (*self._ring[COMPUTE], *self._ring[COPY], *self._marks, *self._spare_marks, self._base):
            self._driver.cuEventDestroy_v2(event)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run `work`, which launches kernels on torch's current stream: the compute stream."""
        assert stream == COMPUTE, "bytes go over the copy stream with `copy`"
        work()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes of registered host memory to the device on the copy stream; addresses are plain numbers."""
        failed = self._memcpy(target, source, size, self._handles[COPY])
        if failed:
            raise InputError(f"a host-to-device copy of {size} bytes failed: {_reason(failed)}")

    def calls(self) -> Calls:
        """Return the driver's own functions."""
        return Calls(_address(self._memcpy), _address(self._record_event), self._handles[COPY])

    def next_event(self, stream: int) -> int:
        """Return the event of the stream's next ticket, whose last use is over."""
        return self._free_event(stream, self._recorded[stream] + 1)

    def fail(self, code: int) -> NoReturn:
        """Raise InputError for what the driver answered."""
        raise InputError(f"a host-to-device copy failed: {_reason(code)}")

    def mark(self, stream: int) -> int:
        """Note the GPU's time at this place of `stream`."""
        mark, event = self.open_mark()
        _check(self._record_event(event, self._handles[stream]))
        return mark

    def open_mark(self) -> tuple[int, int]:
        """Return a mark that is still to be recorded, and its event."""
        event = self._spare_marks.pop() if self._spare_marks else _event(timing=True)
        self._marks.append(event)
        return len(self._marks) - 1, event

    def drop_marks(self, count: int) -> None:
        """Put the events of the last marks back."""
        for _ in range(count):
            self._spare_marks.append(self._marks.pop())

    def reserve_marks(self, count: int) -> None:
        """Make events for `count` marks, so that marking costs no more than recording one."""
        self._spare_marks += [_event(timing=True) for _ in range(count)]

    def mark_ns(self, mark: int) -> int:
        """Return the ns of a mark; events know it to about half a microsecond."""
        if self._times:
            return self._times[mark]
        milliseconds = ctypes.c_float()
        _check(self._driver.cuEventElapsedTime(ctypes.byref(milliseconds), self._base, self._marks[mark]))
        return self._base_ns + int(milliseconds.value * 1e6)

    def _record(self, stream: int, ticket: int) -> None:
        _check(self._record_event(self._free_event(stream, ticket), self._handles[stream]))

    def _free_event(self, stream: int, ticket: int) -> int:
        """Return the event of a ticket that was not recorded yet, once its last use is over."""
        if ticket > RING:
            self.synchronize(stream, ticket - RING)
        return self._ring[stream][ticket % RING]

    def _wait(self, stream: int, on: int, ticket: int) -> None:
        _check(self._wait_event(self._handles[stream], self._ring[on][ticket % RING], 0))

    def _query(self, stream: int, ticket: int) -> bool:
        found = self._query_event(self._ring[stream][ticket % RING])
        if found != _NOT_READY:
            _check(found)
        return bool(found != _NOT_READY)

    def _synchronize(self, stream: int, ticket: int) -> None:
        _check(self._driver.cuEventSynchronize(self._ring[stream][ticket % RING]))


def copy_on(stream: int, target: int, source: int, size: int) -> None:
    """Copy `size` bytes of registered host memory to the device on the stream of that handle. Raises InputError."""
    _check(_driver().cuMemcpyHtoDAsync_v2(target, source, size, stream))


def register(address: int, size: int) -> None:
    """Make host memory known to the driver, so that copies from it run at full speed and on their own. Raises InputError."""
    failed = _driver().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), 0)
    if failed:
        raise InputError(f"{size / 1e9:.2f} GB of host memory cannot be registered with the GPU's driver: {_reason(failed)}")


def unregister(address: int) -> None:
    """Undo `register`."""
    _driver().cuMemHostUnregister(ctypes.c_void_p(address))


@cache
def _streams() -> tuple[Any, Any]:
    """Return the two streams of the process: libraries keep workspaces for every stream that they ever saw."""
    return torch.cuda.Stream(), torch.cuda.Stream()


@cache
def _driver() -> Any:
    torch.zeros(1, device="cuda")  # makes the GPU's context, and makes it current in this thread
    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p
    driver.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, handle, ctypes.c_size_t, handle]
    driver.cuEventElapsedTime.argtypes = [handle, handle, handle]
    driver.cuEventRecord.argtypes = [handle, handle]
    driver.cuStreamWaitEvent.argtypes = [handle, handle, ctypes.c_uint]
    for name in ("cuEventQuery", "cuEventSynchronize", "cuEventDestroy_v2"):
        getattr(driver, name).argtypes = [handle]
    return driver


def _event(*, timing: bool = False) -> int:
    """Return the handle of a new event; one that need not know the time is cheaper."""
    event = ctypes.c_void_p()
    _check(_driver().cuEventCreate(ctypes.byref(event), 0 if timing else 2))
    return event.value or 0


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _check(failed: int) -> None:
    """Raise InputError for what the driver refused."""
    if failed:
        raise InputError(f"the GPU failed: {_reason(failed)}")


def _reason(code: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"unknown").decode()
