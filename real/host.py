"""The host thread, left alone while it drives a GPU: on the CPU that is quickest just now, without garbage collection."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run what is inside on one CPU and without garbage collection.

    On a shared machine one virtual CPU can be three times slower than another, and the scheduler moves a thread about; all
    that the driver and Python cost went down by half on the machine of docs/validation.md.
    """
    gc.collect()
    gc.disable()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if before is not None and len(before) > 1:
            os.sched_setaffinity(0, {quickest_cpu(before)})
        yield
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
        gc.enable()


def quickest_cpu(among: set[int]) -> int:
    """Return the CPU of `among` on which a fixed piece of Python takes the least time; takes about 2 ms each."""
    return min(sorted(among), key=_busy_ns)


def _busy_ns(cpu: int) -> int:
    os.sched_setaffinity(0, {cpu})
    begin = time.perf_counter_ns()
    for _ in range(30):
        sum(range(4000))
    return time.perf_counter_ns() - begin
