"""What a machine's host does without its GPU: experts on the CPU, memory bandwidth, reads from disk. Samples in ns."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EXPERT = (2048, 1024)
"""Hidden size and width of the expert that the CPU computes: OLMoE's."""

_BLOCK = 16 << 20


class HostTimes(NamedTuple):
    """Samples of one host; None for what could not be measured here."""

    cpu_expert: list[float] | None
    """One bf16 expert of the shape `EXPERT` for one token, through torch."""
    memory_copy: tuple[int, list[float]]
    """Bytes read and written by one copy within host memory, and its times."""
    disk_read: tuple[int, list[float]] | None
    """Bytes of one read past the page cache, and its times."""
    notes: tuple[str, ...]
    """A sentence for everything that is missing."""


def measure_host(folder: Path, repeats: int = 15) -> HostTimes:
    """Measure the host; a file for the disk's reads lies in `folder` for a moment."""
    notes: list[str] = []
    cpu_expert = _cpu_expert(repeats)
    if cpu_expert is None:
        notes.append("experts on the CPU were not measured: torch is not installed")
    disk_read = _disk_read(folder, repeats)
    if disk_read is None:
        notes.append(f"the disk was not measured: the file system of {folder} has no reads past the page cache")
    return HostTimes(cpu_expert, _memory_copy(repeats), disk_read, tuple(notes))


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the ns of `repeats` calls of `work`, after two that are not counted."""
    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter_ns()
        work()
        samples.append(float(time.perf_counter_ns() - begin))
    return samples[2:]


def _cpu_expert(repeats: int) -> list[float] | None:
    try:
        import torch
    except ImportError:
        return None
    hidden, width = EXPERT
    token = torch.randn(1, hidden, dtype=torch.bfloat16)
    # Several experts in turn: what is computed next is not what the caches hold.
    experts = [
        (torch.randn(2 * width, hidden).bfloat16() * 0.02, torch.randn(hidden, width).bfloat16() * 0.02) for _ in range(16)
    ]
    turn = iter(range(10**9))

    def compute() -> None:
        gate_up, down = experts[next(turn) % len(experts)]
        gate, up = torch.nn.functional.linear(token, gate_up).chunk(2, dim=-1)
        torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)

    with torch.inference_mode():
        return timed(compute, repeats)


def _memory_copy(repeats: int) -> tuple[int, list[float]]:
    source = np.ones(_BLOCK * 8, np.uint8)
    target = np.zeros_like(source)
    return 2 * source.nbytes, timed(lambda: np.copyto(target, source), repeats)


def _disk_read(folder: Path, repeats: int) -> tuple[int, list[float]] | None:
    """Read blocks of a file of 16 blocks, each once, with O_DIRECT; None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    blocks = repeats + 2
    descriptor, path = tempfile.mkstemp(prefix=".foregate-calibrate-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for _ in range(blocks):
                file.write(os.urandom(_BLOCK))
            file.flush()
            os.fsync(file.fileno())
        return _read_blocks(path, blocks)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # the file system refuses O_DIRECT, or is full
            return None
        raise
    finally:
        Path(path).unlink(missing_ok=True)


def _read_blocks(path: str, blocks: int) -> tuple[int, list[float]] | None:
    try:
        reading = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    buffer = mmap.mmap(-1, _BLOCK)  # O_DIRECT needs a page's alignment
    offsets = iter(range(0, blocks * _BLOCK, _BLOCK))
    try:
        return _BLOCK, timed(lambda: os.preadv(reading, [buffer], next(offsets)), blocks - 2)
    finally:
        os.close(reading)
        buffer.close()
