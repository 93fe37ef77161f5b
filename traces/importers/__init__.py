"""Readers of other programs' recordings: one file here is one format.

A format is a module of this folder with a docstring that describes it and a function
``read(path, **options) -> Trace``. There is nothing else to edit. A name that begins with an underscore
is a helper and no format.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from traces.checks import validate_trace
from traces.errors import InputError, nearest
from traces.trace import Trace


def importers() -> dict[str, ModuleType]:
    """Return the formats that can be imported: module by name, as found in this folder."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def import_trace(path: str | PathLike[str], format: str, **options: Any) -> Trace:  # noqa: A002
    """Read another program's recording at `path`, written in `format`, a key of `importers()`.

    `options` go to the format's `read`. The trace is checked like one of our own files.

    Raises `InputError` for an unknown format or option, and for a file that is not what it should be.
    """
    known = importers()
    if format not in known:
        raise InputError(f"format: '{format}' cannot be imported; {nearest(format, known)}")
    read = known[format].read
    accepted = [name for name in inspect.signature(read).parameters if name != "path"]
    for option in options:
        if option not in accepted:
            raise InputError(f"format '{format}': unknown option '{option}'; {nearest(option, accepted)}")
    trace: Trace = read(Path(path), **options)
    validate_trace(trace, str(path))
    return trace
