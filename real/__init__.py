"""The real backend: an executor on a GPU, what it measures, and how far the simulation is from that."""

from __future__ import annotations

import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say an interrupt that nobody caught in a word; the exit status stays that of an interrupt."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted before anything ran", file=sys.stderr)  # noqa: T201
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # while Python looks for a command of this package, whose imports take seconds
    sys.excepthook = _say
