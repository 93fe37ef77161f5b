"""The recording on disk while it grows: one raw file per array, and a record of how much of them counts.

Rows are appended; a batch counts once `commit` has replaced the record in one stroke. A recording that was killed at any
moment therefore goes on at its last whole batch: what was appended after it is cut off. When all is there, the raw files
are mapped and written as one trace, so that memory never holds the recording.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from traces.errors import InputError
from traces.trace import Array

_RECORD = "recorded.json"

Columns = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Element type and shape of one row, by the array's name in `Trace`."""


class GrowingColumns:
    """Appends rows of arrays in `folder`, which is created, or taken up where it was left.

    `settings` (JSON values) say what is being recorded. Raises `InputError` when the folder was begun with other settings,
    or holds something else.
    """

    def __init__(self, folder: Path, columns: Columns, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.columns = columns
        self.settings = settings
        self.rows = 0
        """Rows appended, committed or not."""
        self.batches = 0
        """Batches committed."""
        self.steps = 0
        """Forward passes committed."""
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> GrowingColumns:
        with self.said():
            if self.folder.exists():
                self._take_up()
            else:
                self._begin()
            for name in self.columns:
                self._files[name] = self._path(name).open("ab")
                self._files[name].truncate(self.rows * self._row_bytes(name))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            # What a full disk refused is refused again; it did not count, and the error that matters is on its way.
            with suppress(OSError):
                file.close()
        if self.batches == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, rows: Mapping[str, Array]) -> None:
        """Append rows: one array per column, all of one length, in the columns' types."""
        with self.said():
            for name, (dtype, shape) in self.columns.items():
                array = rows[name]
                assert array.dtype == dtype, (name, array.dtype)
                assert array.shape[1:] == shape, (name, array.shape)
                self._files[name].write(np.ascontiguousarray(array).data)
        self.rows += len(rows["experts"])

    def commit(self, steps: int) -> None:
        """Make everything appended so far count, as one more batch; `steps` forward passes are recorded by now."""
        with self.said():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            self._write_record(self.folder, self.batches + 1, steps)
        self.batches, self.steps = self.batches + 1, steps

    def read(self, start: int = 0) -> dict[str, Array]:
        """Return the rows appended since `start`, mapped read-only from the files."""
        with self.said():
            for file in self._files.values():
                file.flush()
        return {
            name: np.memmap(self._path(name), dtype, "r", shape=(self.rows, *shape))[start:]
            for name, (dtype, shape) in self.columns.items()
        }

    def _begin(self) -> None:
        # Renamed into place, so that a kill leaves no folder without its record.
        unfinished = self.folder.with_name(f"{self.folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            self._write_record(unfinished, batches=0, steps=0)
            os.replace(unfinished, self.folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _take_up(self) -> None:
        record = read_record(self.folder)
        differing = differing_setting(record["settings"], self.settings)
        if differing:
            raise InputError(
                f"{self.folder}: this recording was begun with other settings: {differing};"
                " finish it with those, or remove it"
            )
        self.rows, self.batches, self.steps = record["rows"], record["batches"], record["steps"]
        for name in self.columns:
            size = self._path(name).stat().st_size if self._path(name).exists() else 0
            if size < self.rows * self._row_bytes(name):
                raise InputError(
                    f"{self._path(name)}: {size:,} bytes are there, and {self.rows * self._row_bytes(name):,} were recorded;"
                    f" remove {self.folder} and record again"
                )

    def _write_record(self, folder: Path, batches: int, steps: int) -> None:
        record = {"settings": self.settings, "rows": self.rows, "batches": batches, "steps": steps}
        unfinished = folder / f"{_RECORD}.unfinished"
        with unfinished.open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / _RECORD)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self.columns[name]
        return dtype.itemsize * int(np.prod(shape))

    @contextmanager
    def said(self) -> Iterator[None]:
        """Turn a refusal of the disk into the sentence that says what is kept."""
        try:
            yield
        except OSError as error:
            kept = f"{self.batches} finished batches are kept" if self.batches else "nothing is kept"
            raise InputError(
                f"{self.folder}: {error.strerror or error}; {kept}, and the same command goes on when this is mended"
            ) from None


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `folder` says about itself: settings, rows, batches, steps.

    Raises `InputError` when it is not a recording in progress.
    """
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or set(record) != {"settings", "rows", "batches", "steps"}:
        raise InputError(
            f"{folder}: this is no recording in progress (there is no sound {_RECORD}); remove it or move it away"
        )
    return record


def differing_setting(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first setting that differs, as ``NAME was X and is now Y``; "" when none does."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r:.80} and is now {now.get(name)!r:.80}"
    return ""
