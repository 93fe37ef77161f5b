"""From what the passes of a batch showed to the rows of a trace: padding and ended requests left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from traces.trace import DECODE, PREFILL, Array

TOKEN_COLUMNS: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    "request": (np.dtype(np.int32), ()),
    "position": (np.dtype(np.int32), ()),
    "step": (np.dtype(np.int32), ()),
    "phase": (np.dtype(np.uint8), ()),
    "token_ids": (np.dtype(np.int32), ()),
}
"""Type of the arrays of one value per token."""


class BatchRows:
    """Turns passes of one batch, in order, into rows."""

    def __init__(self, lengths: Sequence[int], first_request: int, first_step: int, end_tokens: frozenset[int]) -> None:
        """`lengths` are the prompts' lengths in tokens; requests and steps are numbered from the first ones given."""
        self.lengths = np.array(lengths, np.int32)
        self.first_request = first_request
        self.end_tokens = np.array(sorted(end_tokens), np.int64)
        self.active = np.ones(len(lengths), bool)
        """Which requests have not ended."""
        self.steps = first_step
        """The step of the next pass; a pass of which nothing is recorded is none."""
        self._fed = self.lengths.copy()
        self._prefilled = False

    def passes(self, seen: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """Yield the rows of each pass in `seen`: first the prefill alone, then any number of decode passes at a time."""
        if self._prefilled:
            yield from self._decode(seen)
        else:
            self._prefilled = True
            yield self._prefill(seen)

    def _prefill(self, seen: Mapping[str, Array]) -> dict[str, Array]:
        """Return the rows of the prefill; `seen` has a row for every token and every padding of the batch."""
        width = int(self.lengths.max())
        real = np.arange(width) >= width - self.lengths[:, None]
        request, column = np.nonzero(real)
        rows = {name: array[real.reshape(-1)] for name, array in seen.items()}
        position = column - (width - self.lengths[request])
        return self._described(rows, request, position, PREFILL)

    def _decode(self, seen: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """Yield the rows of each of several decode passes; `seen` has a row for every request of each pass."""
        requests = len(self.lengths)
        for start in range(0, len(seen["token_ids"]), requests):
            # The end-of-sequence token is where generation stops: it is not fed, so it is no row.
            self.active &= ~np.isin(seen["token_ids"][start : start + requests], self.end_tokens)
            if not self.active.any():
                return
            chosen = np.flatnonzero(self.active)
            rows = {name: array[start + chosen] for name, array in seen.items()}
            yield self._described(rows, chosen, self._fed[chosen], DECODE)
            self._fed += 1

    def _described(self, rows: dict[str, Array], request: Array, position: Array, phase: int) -> dict[str, Array]:
        """Add to the rows of one pass who, where and when they are."""
        count = len(request)
        rows["request"] = (self.first_request + request).astype(np.int32)
        rows["position"] = position.astype(np.int32)
        rows["step"] = np.full(count, self.steps, np.int32)
        rows["phase"] = np.full(count, phase, np.uint8)
        rows["token_ids"] = rows["token_ids"].astype(np.int32)
        self.steps += 1
        return rows
