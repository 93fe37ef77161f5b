"""Results on disk: Parquet files that many workers write at once, and that a sweep can be resumed from.

Every result is written as a file of its own, at once and whole; `compact` later moves many of them into one part, which
is read a thousand times faster. Readers see no difference: rows are found by key, wherever they lie, and count once.

A row is a flat dict: the identity columns (what was run), the figures of `sim.result.metrics` (what came out)
and `limited_by`. `SCHEMA` names every column; its meaning and unit are in ``docs/results.md``.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
import pyarrow.dataset  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from sim.result import KINDS
from traces.atomic import write_atomically
from traces.errors import InputError, nearest

_TEXT, _INT, _FLOAT, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()

IDENTITY: dict[str, pa.DataType] = {
    "trace": _TEXT,
    "trace_hash": _TEXT,
    "trace_kind": _TEXT,
    "trace_model": _TEXT,
    "workload": _TEXT,
    "hardware": _TEXT,
    "model": _TEXT,
    "system": _TEXT,
    "ceiling": _FLAG,
    "budget": _FLOAT,
    "budget_bytes": _INT,
    "slots": _INT,
    "seed": _INT,
    "engine": _TEXT,
    "code_version": _TEXT,
    "key": _TEXT,
    "config": _TEXT,
    "device_bytes_peak": _INT,
    "note": _TEXT,
}
"""Columns that say what was run."""

FIGURES: dict[str, pa.DataType] = {
    "tokens_per_s": _FLOAT,
    **{f"{name}_{part}": _FLOAT for name in ("tpot_ms", "ttft_ms") for part in ("mean", "p50", "p95", "p99")},
    "compute_ms_per_token": _FLOAT,
    "wait_ms_per_token": _FLOAT,
    "host_ms_per_token": _FLOAT,
    "link_busy_share": _FLOAT,
    "hits": _INT,
    "late_hits": _INT,
    "misses": _INT,
    "hit_rate": _FLOAT,
    **{f"{kind}_bytes": _INT for kind in KINDS},
    "moved_mb_per_token": _FLOAT,
    "prefetches": _INT,
    "cancelled_prefetches": _INT,
    "predictor_precision": _FLOAT,
    "predictor_recall": _FLOAT,
    "gate_mass_skipped": _FLOAT,
    "gate_mass_substituted": _FLOAT,
    "tokens": _INT,
    "steps": _INT,
    "end_ns": _INT,
    "requests": pa.list_(_INT),
    "request_tokens": pa.list_(_INT),
    "request_ns": pa.list_(_FLOAT),
    "limited_by": _TEXT,
}
"""Columns that say what came out: those of `sim.result.metrics`, and `limited_by`."""

SCHEMA = pa.schema(list((IDENTITY | FIGURES).items()))
"""Every column and its type, said once: no file's types may depend on the values that it happens to hold."""

LISTS = tuple(name for name, kind in FIGURES.items() if pa.types.is_list(kind))
"""Columns that hold one list per row: the requests, and what the paired bootstrap resamples."""

MAY_BE_ABSENT = frozenset({"trace_model", "note"})
"""Columns that `write_row` fills with null where the row lacks them."""

PART_ROWS = 1000
"""Parts with fewer rows are merged with the next ones."""

_PART = "part-"
_KEY = re.compile(rf"(?!{_PART})[0-9A-Za-z_-]+")
_ERRORS = (pa.ArrowException, OSError, TypeError, KeyError)
_ATTEMPTS = 20


def has(directory: str | os.PathLike[str], key: str) -> bool:
    """Whether `directory` holds the result of `key`; if so it is whole, for files appear at once."""
    # First the file, then the parts: a file only goes away when its row is in a part.
    return _path(directory, key).is_file() or any(key in keys for keys in _part_keys(directory).values())


def stored_keys(directory: str | os.PathLike[str]) -> set[str]:
    """Return the keys of all results in `directory`; raises InputError where a part is damaged."""
    keys = {path.stem for path in _loose(directory)}
    return keys.union(*_part_keys(directory).values())


def keys_by_age(directory: str | os.PathLike[str]) -> list[str]:
    """Return the keys of all results in the order in which they were written; raises InputError where a part is damaged."""
    loose = _by_age(_loose(directory))
    parts = _part_keys(directory)
    old = [key for part in _by_age(list(parts)) for key in parts[part]]
    return list(dict.fromkeys([*old, *(path.stem for path in loose)]))


def write_row(directory: str | os.PathLike[str], row: Mapping[str, Any]) -> Path:
    """Store one row and return its file, ``DIRECTORY/rows/<key>.parquet``.

    Safe for any number of workers and for a kill at any moment: a reader sees the whole file or none. A row
    of the same key is replaced. Raises ValueError where columns or their types are not those of `SCHEMA`:
    that is a defect of the caller.
    """
    unknown = sorted(set(row) - set(SCHEMA.names))
    if unknown:
        raise ValueError(f"sim/store.py does not know the type of the columns {', '.join(unknown)}")
    missing = sorted(set(SCHEMA.names) - set(row) - MAY_BE_ABSENT)
    if missing:
        raise ValueError(f"the row lacks the columns {', '.join(missing)}")
    table = pa.table([_column(field, row.get(field.name)) for field in SCHEMA], schema=SCHEMA)
    # In a file of one row, dictionaries, statistics, compression and a copy of the schema only cost time.
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(
        table, sink, use_dictionary=False, write_statistics=False, compression="none", store_schema=False
    )
    path = _path(directory, row["key"])
    write_atomically(path, sink.getvalue())
    return path


def read_rows(
    directory: str | os.PathLike[str],
    keys: Iterable[str] | None = None,
    *,
    columns: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return the stored rows as a table with the columns of `SCHEMA`, one row per key.

    `columns` names those wanted: the others are not read, which matters for ``config`` and the lists per request. `where`
    maps columns to the value, or the list of values, that a row must have. Rows come in the order of `keys`, or sorted by
    key where none are given. List columns hold Python lists. A column of text or fractions that a file of another version
    lacks is null.

    Raises InputError where a file is damaged or is no result, where a key is not stored, where a column is unknown, and
    where there is no result at all; a `where` that no row fulfils gives a table without rows.
    """
    wanted = None if keys is None else list(dict.fromkeys(keys))
    columns = SCHEMA.names if columns is None else list(dict.fromkeys(columns))
    for name in (*columns, *(where or ())):
        if name not in SCHEMA.names:
            raise InputError(f"'{name}' is not a column of the results: {nearest(name, SCHEMA.names)}")
    table = _read(directory, wanted, [*columns, *({"key"} - set(columns))], where or {})
    places: dict[str, int] = {}
    for place, key in enumerate(table["key"].to_pylist()):
        places.setdefault(key, place)
    order = [places[key] for key in (sorted(places) if wanted is None else wanted) if key in places]
    table = table.take(pa.array(order, pa.int64()))
    lists = [name for name in LISTS if name in columns]
    frame: pd.DataFrame = table.drop_columns(lists).to_pandas()
    for name in lists:
        frame[name] = pd.Series(table[name].to_pylist(), index=frame.index, dtype=object)
    return frame[columns]


def compact(directory: str | os.PathLike[str]) -> int:
    """Move the rows that lie in files of their own, and those of small parts, into one part; return how many they are.

    Safe at any time, beside writers, readers and other compactions, and for a kill at any moment: the part is whole and on
    the disk before the first file is deleted. Files that are damaged or of another version stay where they are. A part holds
    its rows in the order in which they were written.
    """
    for _ in range(_ATTEMPTS):
        loose = _loose(directory)
        if not loose:
            return 0
        small = [part for part, keys in _part_keys(directory).items() if len(keys) < PART_ROWS]
        files = [*_by_age(small), *_by_age(loose)]
        try:
            table = _table(files, SCHEMA.names, None)
        except _ERRORS:
            table = None
        if table is None or _has_nulls(table):
            files = [path for path in files if path.is_file() and _wrong(path) is None]
            if not files:
                return 0
            try:
                table = _table(files, SCHEMA.names, None)
            except FileNotFoundError:
                continue  # another compaction was faster
        keys = table["key"].to_pylist()
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        table = table.take(sorted(first.values()))
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=PART_ROWS)
        content = sink.getvalue().to_pybytes()
        part = _folder(directory) / f"{_PART}{hashlib.sha256(content).hexdigest()[:32]}.parquet"
        write_atomically(part, content)
        _flush(part)
        for path in files:
            if path != part:
                path.unlink(missing_ok=True)
        _sweep_up(directory)
        return len(first)
    return 0


_NEVER_NULL = tuple(field.name for field in SCHEMA if field.type in (_INT, _FLAG) or field.name in (*LISTS, "key"))
"""Columns without a value for "unknown": a null would turn whole numbers into fractions."""


def _folder(directory: str | os.PathLike[str]) -> Path:
    return Path(directory) / "rows"


def _path(directory: str | os.PathLike[str], key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError(f"'{key}' is no key: it names a file and is made of letters, digits, '-' and '_'")
    return _folder(directory) / f"{key}.parquet"


def _loose(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the files of one row; files that are still being written have another ending."""
    return sorted(path for path in _folder(directory).glob("[!.]*.parquet") if not path.name.startswith(_PART))


def _parts(directory: str | os.PathLike[str]) -> list[Path]:
    return sorted(_folder(directory).glob(f"{_PART}*.parquet"))


def _by_age(files: list[Path]) -> list[Path]:
    """Return files, those written first before the others; what is gone was moved into a part, and is old."""
    written = {}
    for path in files:
        try:
            written[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            written[path] = 0
    return sorted(files, key=lambda path: (written[path], path))


def _part_keys(directory: str | os.PathLike[str]) -> dict[Path, dict[str, None]]:
    """Return the keys in every part, of a moment at which all of them were there."""
    for _ in range(_ATTEMPTS):
        parts = _parts(directory)
        try:
            return {part: _keys_of(part, part.stat().st_size) for part in parts}
        except FileNotFoundError:
            continue  # merged into another part
        except _ERRORS as error:
            raise _first_bad(parts) or InputError(f"{directory}: results cannot be read: {error}") from error
    raise InputError(f"{directory}: results changed while they were read; run again")


@lru_cache(maxsize=256)
def _keys_of(part: Path, size: int) -> dict[str, None]:
    """Return the keys in a part, in its order: it is named after its content, and read once per process."""
    return dict.fromkeys(pyarrow.parquet.read_table(part, columns=["key"])["key"].to_pylist())


def _read(
    directory: str | os.PathLike[str], keys: list[str] | None, columns: list[str], where: Mapping[str, Any]
) -> pa.Table:
    """Return the rows of `keys`, those that `where` wants, in any order; a row may be there twice."""
    for _ in range(_ATTEMPTS):
        loose, parts = _files(directory, keys)
        condition = _condition(where)
        try:
            alone = _table(loose, columns, condition)
            if parts and keys is not None:
                named = pyarrow.compute.field("key").isin(keys)
                condition = named if condition is None else condition & named
            together = _table(parts, columns, condition)
        except _ERRORS as error:
            if not all(path.is_file() for path in (*loose, *parts)):
                time.sleep(0.01)
                continue  # moved into a part while we read
            raise _first_bad([*loose, *parts]) or InputError(f"{directory}: results cannot be read: {error}") from error
        # A listing that ran while files were moved may have missed both the file and the part.
        if _parts(directory) != parts and keys is None:
            continue
        table = pa.concat_tables([alone, together])
        if (not where and alone.num_rows != len(loose)) or _has_nulls(table):
            raise _first_bad([*loose, *parts]) or InputError(f"{directory}: results changed while they were read; run again")
        return table
    raise InputError(f"{directory}: results changed while they were read; run again")


def _table(files: list[Path], columns: list[str], condition: Any) -> pa.Table:
    if not files:
        return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()
    source = pyarrow.dataset.dataset([str(path) for path in files], schema=SCHEMA, format="parquet")
    return source.to_table(columns=columns, filter=condition)


def _condition(where: Mapping[str, Any]) -> Any:
    condition = None
    for name, value in where.items():
        values = list(value) if isinstance(value, (list, tuple, set)) else [value]
        kind = SCHEMA.field(name).type
        try:
            one = pyarrow.compute.field(name).isin(pa.array(values).cast(kind))
        except _ERRORS as error:
            raise InputError(f"{name} is {value!r}, but that column holds {kind}") from error
        condition = one if condition is None else condition & one
    return condition


def _has_nulls(table: pa.Table) -> bool:
    return any(table[name].null_count for name in _NEVER_NULL if name in table.column_names)


def _files(directory: str | os.PathLike[str], keys: list[str] | None) -> tuple[list[Path], list[Path]]:
    """Return the files of one row and the parts to read; a row that is in a part is read there, for its file may go."""
    # First the files, then the parts: a file only goes away when its row is in a part.
    files = _loose(directory) if keys is None else [path for key in keys if (path := _path(directory, key)).is_file()]
    parts = _part_keys(directory)
    held = frozenset().union(*parts.values())
    loose = [path for path in files if path.stem not in held]
    if keys is None:
        if not loose and not parts:
            raise InputError(f"{directory}: no results: there is no file rows/*.parquet")
        return loose, list(parts)
    if not keys:
        raise InputError(f"{directory}: no results are asked for")
    alone = {path.stem for path in loose}
    absent = [key for key in keys if key not in alone and key not in held]
    if absent:
        raise InputError(f"{directory}: {len(absent)} of {len(keys)} results are not stored, the first is {absent[0]}")
    return loose, [part for part, found in parts.items() if not found.keys().isdisjoint(keys)]


def _flush(path: Path) -> None:
    """Return when the file is on the disk, so that what it replaces may go."""
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep_up(directory: str | os.PathLike[str]) -> None:
    """Delete what writers that were killed more than an hour ago have left."""
    for path in _folder(directory).glob(".*.tmp"):
        try:
            if path.stat().st_mtime < time.time() - 3600:
                path.unlink()
        except FileNotFoundError:
            pass


def _first_bad(files: list[Path]) -> InputError | None:
    """Return what is wrong with the first file that cannot be read, if there is one."""
    for path in files:
        wrong = _wrong(path)
        if wrong:
            return InputError(f"{path}: {wrong}; delete the file and run again")
    return None


def _wrong(path: Path) -> str | None:
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except _ERRORS:
        return "not a whole Parquet file (cut short, or something else)"
    absent = [name for name in _NEVER_NULL if name not in table.column_names]
    if absent:
        return f"not a result of this version of foregate (it lacks the column {absent[0]})"
    if table.num_rows != 1 and not path.name.startswith(_PART):
        return f"holds {table.num_rows} rows where a result is one"
    for name in SCHEMA.names:
        if name not in table.column_names:
            continue
        if table[name].null_count and name in _NEVER_NULL:
            return f"the column {name} is empty"
        try:
            table[name].cast(SCHEMA.field(name).type)
        except _ERRORS:
            return f"the column {name} holds {table.schema.field(name).type}, not {SCHEMA.field(name).type}"
    return None


def _column(field: pa.Field, value: Any) -> pa.Array:
    """Return a column of one value, of the field's type."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if plain is None and field.name in _NEVER_NULL:
        raise ValueError(f"the column {field.name} is None")
    try:
        # The cast is what refuses 1.5 as a whole number: pa.array([1.5], pa.int64()) gives 1.
        return pa.array([plain]).cast(field.type)
    except _ERRORS as error:
        raise ValueError(f"the column {field.name} holds {value!r} where {field.type} is due") from error
