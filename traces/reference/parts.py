"""The files that a run brings back: one round of the recording each."""

from __future__ import annotations

from pathlib import Path

from traces.errors import InputError
from traces.files import load_trace
from traces.trace import Trace


def load_parts(folder: Path, name: str) -> list[Trace]:
    """Return the parts of the recording `name` in `folder`, in order.

    Raises `InputError` when there is none.
    """
    paths = sorted(folder.glob(f"{name}-[0-9].safetensors"))
    if not paths:
        raise InputError(f"{folder}: there is no {name}-1.safetensors; `python -m traces.reference train {name}` writes it")
    return [load_trace(path, verify=True) for path in paths]
