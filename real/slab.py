"""The host side of offloading: every expert as one block of plain memory, registered with the driver where there is one."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from traces.errors import InputError

PAGE = 4096
PIECE_BYTES = 4 << 30
"""Memory is registered in pieces of about this size, each of whole experts, so that no copy spans two."""


def slot_bytes_of(expert_bytes: int) -> int:
    """Return `expert_bytes` rounded up to whole pages."""
    return -(-expert_bytes // PAGE) * PAGE


class HostSlab:
    """Experts in host memory, `blocks` [experts, slot_bytes] uint8, one contiguous block each.

    The memory is plain (pinned allocators round up to powers of two) and `register(address, size)` makes the driver know it,
    `unregister(address)` undoes that. Raises InputError where there is not enough memory; whatever was registered until
    then is released.
    """

    def __init__(
        self,
        experts: int,
        expert_bytes: int,
        register: Callable[[int, int], None] | None = None,
        unregister: Callable[[int], None] | None = None,
    ) -> None:
        self.slot_bytes = slot_bytes_of(expert_bytes)
        self.expert_bytes = expert_bytes
        size = experts * self.slot_bytes
        try:
            memory = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them; 2 MB a page is touched and registered several times faster
                    memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(f"{size / 1e9:.1f} GB of host memory for {experts} experts cannot be had: {error}") from error
        self.blocks: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(experts, self.slot_bytes)
        self.address = self.blocks.ctypes.data
        self._unregister = unregister
        self._registered: list[int] = []
        self._touch()
        if register is not None:
            piece = max(PIECE_BYTES // self.slot_bytes, 1) * self.slot_bytes
            try:
                for start in range(0, size, piece):
                    register(self.address + start, min(piece, size - start))
                    self._registered.append(self.address + start)
            except BaseException:
                self.close()
                raise

    def fill(self, seed: int) -> None:
        """Give every expert other random bf16 weights: one block of them, turned by another offset for each."""
        count = self.expert_bytes // 2
        normal = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)
        block = (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        whole = self.expert_bytes

        def put(expert: int) -> None:
            offset = expert * 7919 * 64 % count * 2
            self.blocks[expert, : whole - offset] = block[offset:]
            self.blocks[expert, whole - offset : whole] = block[:offset]

        with ThreadPoolExecutor() as threads:
            list(threads.map(put, range(len(self.blocks))))

    def close(self) -> None:
        """Release registration and memory; may be called twice."""
        while self._registered:
            address = self._registered.pop()
            assert self._unregister is not None
            self._unregister(address)
        self.blocks = np.empty((0, self.slot_bytes), np.uint8)

    def _touch(self) -> None:
        """Make the memory exist, from several threads: a page costs time when it is first written."""

        def touch(expert: int) -> None:
            self.blocks[expert, ::PAGE] = 0

        with ThreadPoolExecutor() as threads:
            list(threads.map(touch, range(len(self.blocks))))
