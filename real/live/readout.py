"""What the host learns of a router: numbers that the device writes into host memory, without the copy engine.

Every word has the number of its event in the upper half: it is either old or whole, in whatever order the stores arrive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from real.device import COMPUTE, Device
from real.turn import Expected, Words

_LOWER = 0xFFFFFFFF


class Readout:
    """Room for `words` numbers of one event at a time, written by Triton kernels if `kernels` says so, else by torch.

    `turn` [1] on the device is the count of events that were computed.
    """

    def __init__(self, words: int, turn: torch.Tensor, device: Device, where: str, *, kernels: bool) -> None:
        self._device, self._kernels = device, kernels
        self._tensor = torch.zeros(words, dtype=torch.int64, pin_memory=where != "cpu")
        self._numbers = self._tensor.numpy()
        self.turn = turn
        self._tag = 0
        """What the words of the running event carry."""
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def expect(self, event: int, sizes: dict[str, int]) -> None:
        """Say how many numbers of each name come with `event`, counted from 0; they lie in the order of the names."""
        self._tag = event + 1
        self._end = 0
        self._places = {}
        for name, size in sizes.items():
            self._places[name] = (self._end, self._end + size)
            self._end += size

    def words(self, name: str) -> Any:
        """Return the words of `name`, for a kernel to write."""
        start, stop = self._places[name]
        return self._tensor[start:stop]

    def publish(self, name: str, values: Any) -> None:
        """Submit the writing of `values`, as many as `expect` was told."""
        words = self.words(name)
        if self._kernels:
            from real import kernels

            kernels.publish(values.contiguous(), self.turn, words)
            return

        def write() -> None:
            flat = values.reshape(-1)
            bits = flat.float().view(torch.int32) if values.is_floating_point() else flat.to(torch.int32)
            words.copy_((bits.to(torch.int64) & _LOWER) | ((self.turn.to(torch.int64) + 1) << 32))

        self._device.submit(COMPUTE, write)

    @property
    def format(self) -> Words:
        """All words, and how to read them."""
        return Words(self._numbers, 32, 0)

    def expected(self, count: int) -> Expected:
        """Say which words come with the event; the last `count` are what experts the router chose."""
        return Expected(0, self._end, count, self._tag)

    def complete(self) -> bool:
        """Whether all words of the event are there."""
        return bool((self._numbers[: self._end] >> 32 == self._tag).all())

    def whole(self, name: str) -> Any:
        """Return whole numbers of the event, int32."""
        start, stop = self._places[name]
        return (self._numbers[start:stop] & _LOWER).astype(np.uint32).view(np.int32)

    def fractions(self, name: str) -> Any:
        """Return fractions of the event, float32."""
        return self.whole(name).view(np.float32)
