"""A measured run on disk: one cell of the executor with its times, its decisions and what it ran on.

Three files, NAME.json (what was run and on what), NAME.parquet (one row per step) and NAME.log.json.gz (the decisions).
The reader rejects what does not fit together and repairs nothing; a file whose cell does not have the hash that it states
is not to be believed. Torch is not needed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from real.pricing import JUDGED, Log
from sim.result import KINDS
from traces.atomic import write_atomically
from traces.errors import InputError

FORMAT = "foregate.measured.2"

PARTS = ("compute_ns", "wait_ns", "host_ns")
"""Columns that add up to `total_ns` in the steps that have them."""

COLUMNS = {
    "step": False,
    "phase": False,
    "total_ns": False,
    **dict.fromkeys(PARTS, True),
    "link_busy_ns": True,
    "hits": False,
    "late_hits": False,
    "misses": False,
}
"""Whole numbers of 64 bits, and whether they may be null: the parts are measured in marked steps only. `phase` is 1 where
the step makes tokens, `link_busy_ns` the time that the link spent on copies submitted in the step."""

FIELDS: dict[str, Any] = {
    "format": str,
    "name": str,
    "cell": dict,
    "cell_hash": str,
    "trace_hash": str,
    "device": str,
    "driver": (str, type(None)),
    "versions": dict,
    "bytes_by_kind": dict,
    "link_bytes_per_s": (float, int, type(None)),
    "copy_efficiency": (float, int, type(None)),
    "pass_ns": list,
    "decisions_digest": str,
}
"""Fields of the JSON file and their types; all must be there, and no others."""


class MeasuredRun(NamedTuple):
    """One cell as it ran on a device."""

    cell: dict[str, Any]
    """The resolved configuration: the fields of `real.replay.Cell`."""
    trace_hash: str
    device: str
    driver: str | None
    versions: dict[str, str]
    steps: pd.DataFrame
    """One row per timed or marked step, `COLUMNS`."""
    log: Log
    """Decisions of all steps from the first: (ns, what, key, event)."""
    bytes_by_kind: dict[str, int]
    """Bytes moved over the whole run, by `sim.result.KINDS`."""
    link_bytes_per_s: float | None = None
    """Rate of copies back to back, measured beside the run."""
    copy_efficiency: float | None = None
    """Rate of the link in bursts of misses, as a share of `link_bytes_per_s`."""
    pass_ns: Sequence[float] = ()
    """Mean duration of the timed steps in every pass, ns; empty where it ran once."""

    @property
    def name(self) -> str:
        """The cell's name."""
        return str(self.cell["name"])

    @property
    def marked(self) -> pd.DataFrame:
        """The steps whose parts were measured."""
        return self.steps[self.steps["compute_ns"].notna()]

    @property
    def timed(self) -> pd.DataFrame:
        """The steps that were timed undisturbed; the marked ones where there are no others."""
        plain = self.steps[self.steps["compute_ns"].isna()]
        return plain if len(plain) else self.steps


def cell_hash(cell: Mapping[str, Any]) -> str:
    """Return the sha256 of a cell's fields, whatever their order; where its trace lies does not count."""
    fields = {name: value for name, value in cell.items() if name != "trace"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def decisions_digest(log: Log) -> str:
    """Return the sha256 of the decisions of a log, whenever they happened."""
    return hashlib.sha256(json.dumps([list(entry[1:]) for entry in log]).encode()).hexdigest()


def make_steps(
    first: int,
    decode: Any,
    total_ns: Any,
    parts: Mapping[str, Any] | None,
    counts: Mapping[str, Any],
) -> pd.DataFrame:
    """Return the table of steps `first`, `first` + 1, ...: timed ones of `total_ns`, then marked ones of `parts`.

    `decode` [S] and `counts` (``hits``, ``late_hits``, ``misses``, each [S]) are of all of these steps; `parts` holds
    ``compute``, ``wait``, ``host`` and ``link_busy`` of the marked ones.
    """
    marked = {name: [] if parts is None else list(parts[name]) for name in ("compute", "wait", "host", "link_busy")}
    unknown = [None] * len(total_ns)
    totals = [sum(row) for row in zip(marked["compute"], marked["wait"], marked["host"], strict=True)]
    columns: dict[str, Any] = {
        "step": range(first, first + len(total_ns) + len(totals)),
        "phase": np.asarray(decode, np.int64),
        "total_ns": [*total_ns, *totals],
        **{f"{name}_ns": [*unknown, *values] for name, values in marked.items()},
        **counts,
    }
    return pd.DataFrame({name: pd.array(list(columns[name]), dtype="Int64") for name in COLUMNS})


# ---- writing and reading -----------------------------------------------------------------------------------------


def write_measured(folder: str | os.PathLike[str], run: MeasuredRun) -> Path:
    """Write a run into `folder` and return its JSON file, which is written last: who sees it finds the others whole."""
    base = Path(folder) / _file_name(run.name)
    base.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "format": FORMAT,
        "name": run.name,
        "cell": run.cell,
        "cell_hash": cell_hash(run.cell),
        "trace_hash": run.trace_hash,
        "device": run.device,
        "driver": run.driver,
        "versions": run.versions,
        "bytes_by_kind": run.bytes_by_kind,
        "link_bytes_per_s": run.link_bytes_per_s,
        "copy_efficiency": run.copy_efficiency,
        "pass_ns": list(run.pass_ns),
        "decisions_digest": decisions_digest(run.log),
    }
    schema = pa.schema([pa.field(name, pa.int64(), nullable=nullable) for name, nullable in COLUMNS.items()])
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pandas(run.steps, schema=schema, preserve_index=False), sink)
    log = json.dumps([list(entry) for entry in run.log]).encode()
    write_atomically(base.with_suffix(".parquet"), sink.getvalue().to_pybytes())
    write_atomically(base.with_suffix(".log.json.gz"), gzip.compress(log, mtime=0))
    path = base.with_suffix(".json")
    write_atomically(path, (json.dumps(fields, indent=1) + "\n").encode())
    return path


def read_measured(path: str | os.PathLike[str], cell: Mapping[str, Any] | None = None) -> MeasuredRun:
    """Return the run in the JSON file `path` and the two beside it.

    Raises InputError where something is missing, unknown, of another type or contradicts another part, and where the run is
    not of `cell`, if that is given.
    """
    path = Path(path)
    fields = _read_fields(path)
    if fields["cell_hash"] != cell_hash(fields["cell"]):
        raise InputError(f"{path}: the cell does not have the hash that the file states: it was changed after the run")
    if cell is not None and fields["cell_hash"] != cell_hash(cell):
        raise InputError(f"{path}: this is a measurement of another cell than '{cell['name']}' as it is configured now")
    log = _read_log(path.with_suffix(".log.json.gz"))
    if decisions_digest(log) != fields["decisions_digest"]:
        raise InputError(f"{path}: the decisions do not have the digest that the file states")
    steps = _read_steps(path.with_suffix(".parquet"))
    fields["pass_ns"] = tuple(fields["pass_ns"])
    run = MeasuredRun(steps=steps, log=log, **{name: fields[name] for name in MeasuredRun._fields if name in fields})
    _check(path, run)
    return run


def read_folder(folder: str | os.PathLike[str]) -> list[MeasuredRun]:
    """Return all runs in `folder`, by file name. Raises InputError where there is none."""
    files = [path for path in sorted(Path(folder).glob("*.json")) if path.name not in NOT_RUNS]
    if not files:
        raise InputError(f"{folder}: there is no measured run (NAME.json with NAME.parquet and NAME.log.json.gz)")
    return [read_measured(path) for path in files]


NOT_RUNS = ("summary.json", "hardware.json", "cells.json", "peers.json", "identity.json")
"""JSON files of other kinds that may lie beside runs."""


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name.replace(".", "p"))


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InputError(f"{path}: not a measured run of the format {FORMAT}")
    for name, kind in FIELDS.items():
        if name not in fields:
            raise InputError(f"{path}: {name} is missing")
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise InputError(f"{path}: {name} is {fields[name]!r}")
    if not all(isinstance(each, (int, float)) and each > 0 for each in fields["pass_ns"]):
        raise InputError(f"{path}: pass_ns is {fields['pass_ns']!r}: it must be a list of durations in ns")
    for name in fields:
        if name not in FIELDS:
            raise InputError(f"{path}: {name} is no field of a measured run")
    if sorted(fields["bytes_by_kind"]) != sorted(KINDS):
        raise InputError(f"{path}: bytes_by_kind must be those of {', '.join(KINDS)}")
    return fields


def _read_log(path: Path) -> Log:
    try:
        log = json.loads(gzip.decompress(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'not a gzip file'}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole log") from error
    shape = (int, str, int, int)
    if not isinstance(log, list) or not all(
        isinstance(entry, list) and len(entry) == 4 and all(map(isinstance, entry, shape)) for entry in log
    ):
        raise InputError(f"{path}: entries must be [ns, what, key, event]")
    return [tuple(entry) for entry in log]


def _read_steps(path: Path) -> pd.DataFrame:
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file") from error
    if table.column_names != list(COLUMNS):
        raise InputError(f"{path}: the columns must be {', '.join(COLUMNS)}")
    for name, nullable in COLUMNS.items():
        if table.schema.field(name).type != pa.int64():
            raise InputError(f"{path}: {name} holds {table.schema.field(name).type}, not int64")
        if table[name].null_count and not nullable:
            raise InputError(f"{path}: {name} is empty in {table[name].null_count} steps")
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    assert isinstance(frame, pd.DataFrame)
    return frame


def _check(path: Path, run: MeasuredRun) -> None:
    """Raise InputError where the parts of a run contradict one another."""
    steps, cell = run.steps, run.cell
    try:
        first, timed, marked, layers = (
            int(part) for part in (cell["warmup"], cell["steps"], cell["marked"], cell["model"]["layers"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the cell does not say its warmup, steps, marked or model.layers") from error
    if steps["step"].tolist() != list(range(first, first + timed + marked)):
        raise InputError(
            f"{path}: the cell asks for steps {first} to {first + timed + marked - 1}, and others were measured"
        )
    known = steps[[*PARTS, "link_busy_ns"]].notna().to_numpy()
    if known.any(axis=1).tolist() != [False] * timed + [True] * marked or (known.any(axis=1) != known.all(axis=1)).any():
        raise InputError(f"{path}: compute, wait, host and link must be there in the {marked} marked steps and nowhere else")
    parts = run.marked
    if (parts["total_ns"] != parts[list(PARTS)].sum(axis=1)).any():
        raise InputError(f"{path}: compute, wait and host do not add up to the total")
    if (steps["total_ns"] <= 0).any() or (steps.drop(columns="total_ns").fillna(0) < 0).to_numpy().any():
        raise InputError(f"{path}: a time or a count is below what is possible")
    counted = _counts(run.log, layers, first + timed + marked)
    for name, what in zip(("hits", "late_hits", "misses"), JUDGED, strict=True):
        if steps[name].tolist() != counted[what][first:].tolist():
            raise InputError(f"{path}: {name} are not those of the decisions")


def _counts(log: Log, layers: int, steps: int) -> dict[str, Any]:
    counted = {what: np.zeros(steps, np.int64) for what in JUDGED}
    for _, what, _, event in log:
        if what in counted and 0 <= event // layers < steps:
            counted[what][event // layers] += 1
    return counted


# ---- what the executor writes ------------------------------------------------------------------------------------


def from_replay(
    cell: Mapping[str, Any], row: Mapping[str, Any], log: Log, decode: Any, trace_hash: str, driver: str | None = None
) -> MeasuredRun:
    """Return a cell that `real.replay` ran as a measured run; `decode` [S] says which of the workload's steps make tokens.

    Raises InputError where the result is not of this cell.
    """
    same = {"cell": "name", "warmup": "warmup", "timed": "steps", "marked": "marked"}
    for of_row, of_cell in same.items():
        if row[of_row] != cell[of_cell]:
            raise InputError(f"the result of '{row['cell']}' has {of_row} {row[of_row]!r}, its cell {cell[of_cell]!r}")
    if row["slots"] > cell["slots"]:  # an allocation may hand out fewer
        raise InputError(f"the result of '{row['cell']}' has {row['slots']} slots, its cell {cell['slots']}")
    if dict(row["model"]) != dict(cell["model"]) or row["system"] != cell["system"]["name"]:
        raise InputError(f"the result of '{row['cell']}' is of another model or system than its cell")
    if row["decisions_digest"] != decisions_digest(log):
        raise InputError(f"the decisions of '{row['cell']}' do not have the digest that its result states")
    first = cell["warmup"]
    last = first + cell["steps"] + cell["marked"]
    counts = {name: row[name][first:last] for name in ("hits", "late_hits", "misses")}
    steps = make_steps(first, np.asarray(decode)[first:last], row["step_ns"], row.get("marked_ns"), counts)
    return MeasuredRun(
        cell=json.loads(json.dumps(cell)),
        trace_hash=trace_hash,
        device=row["device"],
        driver=driver,
        versions={"torch": row["torch"]},
        steps=steps,
        log=log,
        bytes_by_kind={kind: int(row["bytes_by_kind"][kind]) for kind in KINDS},
        link_bytes_per_s=_finite(row.get("link_bytes_per_s")),
        copy_efficiency=_finite(row.get("copy_efficiency")),
        pass_ns=tuple(float(each) for each in row.get("pass_ns_mean", ()) if np.isfinite(each)),
    )


_LOG_COLUMNS = ("ns", "what", "key", "event")


def replay_results(folder: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Log]]:
    """Give row and log of every cell that `real.replay` finished in `folder`. Raises InputError where it finished none."""
    folder = Path(folder)
    try:
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        with gzip.open(folder / "decisions.jsonl.gz", "rt") as file:
            logs = {entry["cell"]: [entry[name] for name in _LOG_COLUMNS] for entry in map(json.loads, file)}
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror or 'cannot be read'}") from error
    except (ValueError, EOFError, KeyError) as error:
        raise InputError(f"{folder}: results.jsonl or decisions.jsonl.gz is damaged") from error
    done = {row["cell"]: row for row in rows if "error" not in row}  # a cell that ran again counts as it ran last
    if not done:
        raise InputError(f"{folder}: no cell was finished")
    for name, row in done.items():
        if name not in logs:
            raise InputError(f"{folder}: the decisions of '{name}' are missing")
        yield row, list(zip(*logs[name], strict=True))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
