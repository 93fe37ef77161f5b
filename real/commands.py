"""How the commands of this package end: what is wrong, or that they were interrupted, in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable

from traces.errors import InputError


def ended(run: Callable[[], int], interrupted: str) -> int:
    """Return the exit status of `run`: its own, 2 for an InputError, 130 after an interrupt, said as `interrupted`."""
    try:
        return run()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
