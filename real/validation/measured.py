"""A measured run on disk: one cell of the executor with its times, its decisions and what it ran on.

Four files, NAME.json (what was run and on what), NAME.parquet (one row per step), NAME.log.json.gz (the decisions) and
NAME.spans.json.gz (what host thread and compute stream did in the last marked steps).
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

from real.timeline import HOST_PARTS, STAMPS, host_per_layer, spans_of
from real.validation.pricing import JUDGED, Log
from sim.reference import Span
from sim.result import KINDS
from traces.atomic import write_atomically
from traces.errors import InputError

FORMAT = "foregate.measured.4"

SHOWN_STEPS = 4
"""Of so many of the last marked steps the spans are kept."""

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
    "host_per_layer_ns": (dict, type(None)),
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
    pass_ns: Sequence[Sequence[int]] = ()
    """Duration of every timed step in every pass, ns: of each step `steps` holds the quickest. Empty where unknown."""
    host_per_layer_ns: dict[str, dict[str, float]] | None = None
    """By `real.timeline.HOST_PARTS` the host's ns per layer in the timed steps: ``median``, ``p10``, ``p90``."""
    spans: tuple[Span, ...] = ()
    """What compute stream and host thread did in the last `SHOWN_STEPS` marked steps; none where no step was marked."""

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
        "pass_ns": [list(each) for each in run.pass_ns],
        "host_per_layer_ns": run.host_per_layer_ns,
        "decisions_digest": decisions_digest(run.log),
    }
    schema = pa.schema([pa.field(name, pa.int64(), nullable=nullable) for name, nullable in COLUMNS.items()])
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pandas(run.steps, schema=schema, preserve_index=False), sink)
    write_atomically(base.with_suffix(".parquet"), sink.getvalue().to_pybytes())
    for ending, entries in ((".log.json.gz", run.log), (".spans.json.gz", run.spans)):
        write_atomically(
            base.with_suffix(ending), gzip.compress(json.dumps([list(entry) for entry in entries]).encode(), mtime=0)
        )
    path = base.with_suffix(".json")
    write_atomically(path, (json.dumps(fields, indent=1) + "\n").encode())
    return path


def read_measured(path: str | os.PathLike[str], cell: Mapping[str, Any] | None = None) -> MeasuredRun:
    """Return the run in the JSON file `path` and the three beside it.

    Raises InputError where something is missing, unknown, of another type or contradicts another part, and where the run is
    not of `cell`, if that is given.
    """
    path = Path(path)
    fields = _read_fields(path)
    if fields["cell_hash"] != cell_hash(fields["cell"]):
        raise InputError(f"{path}: the cell does not have the hash that the file states: it was changed after the run")
    if cell is not None and fields["cell_hash"] != cell_hash(cell):
        raise InputError(f"{path}: this is a measurement of another cell than '{cell['name']}' as it is configured now")
    log: Log = _read_entries(path.with_suffix(".log.json.gz"), _LOG_ENTRY)
    if decisions_digest(log) != fields["decisions_digest"]:
        raise InputError(f"{path}: the decisions do not have the digest that the file states")
    steps = _read_steps(path.with_suffix(".parquet"))
    spans = tuple(Span(*entry) for entry in _read_entries(path.with_suffix(".spans.json.gz"), _SPAN_ENTRY))
    fields["pass_ns"] = tuple(tuple(each) for each in fields["pass_ns"])
    known = {name: fields[name] for name in MeasuredRun._fields if name in fields}
    run = MeasuredRun(steps=steps, log=log, spans=spans, **known)
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
    if not all(isinstance(each, list) and all(type(ns) is int and ns > 0 for ns in each) for each in fields["pass_ns"]):
        raise InputError(f"{path}: pass_ns must hold a list of durations in ns, whole and above 0, for every pass")
    host = fields["host_per_layer_ns"]
    if host is not None and not (sorted(host) == sorted(HOST_PARTS) and all(map(_is_spread, host.values()))):
        raise InputError(f"{path}: host_per_layer_ns must have median, p10 and p90 of {', '.join(HOST_PARTS)}")
    for name in fields:
        if name not in FIELDS:
            raise InputError(f"{path}: {name} is no field of a measured run")
    if sorted(fields["bytes_by_kind"]) != sorted(KINDS):
        raise InputError(f"{path}: bytes_by_kind must be those of {', '.join(KINDS)}")
    return fields


def _is_spread(part: Any) -> bool:
    if not isinstance(part, dict) or sorted(part) != ["median", "p10", "p90"]:
        return False
    return (
        all(isinstance(each, (int, float)) for each in part.values()) and 0 <= part["p10"] <= part["median"] <= part["p90"]
    )


_LOG_ENTRY = {"ns": int, "what": str, "key": int, "event": int}
_SPAN_ENTRY = {"resource": str, "what": str, "start": int, "end": int, "key": int, "event": int}


def _read_entries(path: Path, fields: Mapping[str, type]) -> list[Any]:
    """Return a packed list of entries that have these fields, as tuples. Raises InputError."""
    try:
        entries = json.loads(gzip.decompress(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'not a gzip file'}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole log") from error
    kinds = tuple(fields.values())
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and len(entry) == len(kinds) and all(map(isinstance, entry, kinds)) for entry in entries
    ):
        raise InputError(f"{path}: entries must be [{', '.join(fields)}]")
    return [tuple(entry) for entry in entries]


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
    shown = parts[-SHOWN_STEPS:] if run.spans else parts[:0]
    spent = {name: dict.fromkeys(shown["step"].tolist(), 0) for name in ("compute", "wait")}
    for span in run.spans:
        step = span.event // layers
        if step not in spent["wait"]:
            raise InputError(f"{path}: the spans must be of the last {SHOWN_STEPS} marked steps")
        if span.resource == "compute" and span.what != "host":
            spent["wait" if span.what == "wait" else "compute"][step] += span.end - span.start
    for name, by_step in spent.items():
        if list(by_step.values()) != shown[f"{name}_ns"].tolist():
            raise InputError(f"{path}: the spans do not add up to {name}")


def _counts(log: Log, layers: int, steps: int) -> dict[str, Any]:
    counted = {what: np.zeros(steps, np.int64) for what in JUDGED}
    for _, what, _, event in log:
        if what in counted and 0 <= event // layers < steps:
            counted[what][event // layers] += 1
    return counted


# ---- what the executor writes ------------------------------------------------------------------------------------


def from_replay(
    cell: Mapping[str, Any],
    row: Mapping[str, Any],
    log: Log,
    decode: Any,
    trace_hash: str,
    times: Mapping[str, Any] | None = None,
) -> MeasuredRun:
    """Return a cell that `real.replay` ran as a measured run; `decode` [S] says which of the workload's steps make tokens.

    `times` are its ``stamps`` and ``marks`` (`real.timeline`), from its first step. Raises InputError where the result is
    not of this cell.
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
        driver=row.get("driver"),
        versions={"torch": row["torch"]},
        steps=steps,
        log=log,
        bytes_by_kind={kind: int(row["bytes_by_kind"][kind]) for kind in KINDS},
        link_bytes_per_s=_finite(row.get("link_bytes_per_s")),
        copy_efficiency=_finite(row.get("copy_efficiency")),
        pass_ns=tuple(tuple(each) for each in row.get("pass_ns", ())),
        **({} if times is None else _host_and_spans(cell, times)),
    )


def _host_and_spans(cell: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, Any]:
    stamps = np.asarray(times["stamps"], np.int64).reshape(-1, cell["model"]["layers"], len(STAMPS))
    marks = np.asarray(times["marks"], np.int64).reshape(-1, 4)
    first, last = cell["warmup"], cell["warmup"] + cell["steps"]
    shown = range(max(last, last + cell["marked"] - SHOWN_STEPS), last + cell["marked"])
    return {
        "host_per_layer_ns": host_per_layer(stamps[first:last]) if cell["steps"] else None,
        "spans": tuple(Span(*span) for span in spans_of(stamps, marks, shown, shared=cell["model"]["shared_width"] > 0)),
    }


def replay_results(folder: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Log, dict[str, Any]]]:
    """Give row, log and times of every cell that `real.replay` finished in `folder`: the arguments of `from_replay`.

    Raises InputError where it finished none.
    """
    folder = Path(folder)
    try:
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        with gzip.open(folder / "decisions.jsonl.gz", "rt") as file:
            logs = {entry["cell"]: [entry[name] for name in _LOG_ENTRY] for entry in map(json.loads, file)}
        with gzip.open(folder / "stamps.jsonl.gz", "rt") as file:
            times = {entry["cell"]: entry for entry in map(json.loads, file)}
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror or 'cannot be read'}") from error
    except (ValueError, EOFError, KeyError) as error:
        raise InputError(f"{folder}: results.jsonl, decisions.jsonl.gz or stamps.jsonl.gz is damaged") from error
    done = {row["cell"]: row for row in rows if "error" not in row}  # a cell that ran again counts as it ran last
    if not done:
        raise InputError(f"{folder}: no cell was finished")
    for name, row in done.items():
        for found, what in ((logs, "decisions"), (times, "stamps")):
            if name not in found:
                raise InputError(f"{folder}: the {what} of '{name}' are missing")
        yield row, list(zip(*logs[name], strict=True)), times[name]


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
