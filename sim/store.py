"""Results on disk: one Parquet file per row, so that many workers can write and a sweep can be resumed.

A row is a flat dict: the identity columns (what was run), the figures of `sim.result.metrics` (what came out)
and `limited_by`. `SCHEMA` names every column; its meaning and unit are in ``docs/results.md``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.dataset  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from sim.result import KINDS
from traces.atomic import write_atomically
from traces.errors import InputError

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

_KEY = re.compile(r"[0-9A-Za-z_-]+")
_ERRORS = (pa.ArrowException, OSError, TypeError, KeyError)


def has(directory: str | os.PathLike[str], key: str) -> bool:
    """Whether `directory` holds the result of `key`; if so it is whole, for files appear at once."""
    return _path(directory, key).is_file()


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


def read_rows(directory: str | os.PathLike[str], keys: Iterable[str] | None = None) -> pd.DataFrame:
    """Return the stored rows as a table with the columns of `SCHEMA`, one row per key.

    Rows come in the order of `keys`, or sorted by key where none are given. List columns hold Python lists. A
    column of text or fractions that a file of another version lacks is null.

    Raises InputError where a file is damaged or is no result, where a key is not stored, and where there is
    no result at all.
    """
    files = _files(directory, keys)
    try:
        source = pyarrow.dataset.dataset([str(path) for path in files], schema=SCHEMA, format="parquet")
        table = source.to_table()
    except _ERRORS as error:
        raise _first_bad(files) or InputError(f"{directory}: results cannot be read: {error}") from error
    if table.num_rows != len(files) or any(table[name].null_count for name in _NEVER_NULL):
        raise _first_bad(files) or InputError(f"{directory}: results changed while they were read; run again")
    frame: pd.DataFrame = table.drop_columns(list(LISTS)).to_pandas()
    for name in LISTS:
        frame[name] = pd.Series(table[name].to_pylist(), index=frame.index, dtype=object)
    columns: list[str] = SCHEMA.names
    return frame[columns].drop_duplicates("key").reset_index(drop=True)


_NEVER_NULL = tuple(field.name for field in SCHEMA if field.type in (_INT, _FLAG) or field.name in (*LISTS, "key"))
"""Columns without a value for "unknown": a null would turn whole numbers into fractions."""


def _path(directory: str | os.PathLike[str], key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError(f"'{key}' is no key: it names a file and is made of letters, digits, '-' and '_'")
    return Path(directory) / "rows" / f"{key}.parquet"


def _files(directory: str | os.PathLike[str], keys: Iterable[str] | None) -> list[Path]:
    """Return the files to read, in order; files that are still being written have another ending."""
    if keys is None:
        files = sorted((Path(directory) / "rows").glob("[!.]*.parquet"))
    else:
        files = [_path(directory, key) for key in dict.fromkeys(keys)]
        absent = [path.stem for path in files if not path.is_file()]
        if absent:
            raise InputError(f"{directory}: {len(absent)} of {len(files)} results are not stored, the first is {absent[0]}")
    if not files:
        raise InputError(f"{directory}: no results: there is no file rows/*.parquet")
    return files


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
    if table.num_rows != 1:
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
