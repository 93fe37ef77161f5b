"""Replay recorded routing on a GPU, cell by cell: ``python -m real.replay CELLS.json --out DIR``.

A cell is one system on one trace, shape and number of slots, made where the configuration is (`real.cells`) and run where
the GPU is; nothing of the command line is imported. Every cell's result is written as soon as there is one.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies.system import AXES
from real.commands import ended
from real.decisions import Decisions
from real.decoder import ModelShape, ReplayDecoder, SlotPool, Weights
from real.device import COPY, Device, Memory
from real.driver import STAND_IN, check_gpu, device_name, driver_version
from real.executor import Executor, Shape
from real.host import undisturbed
from real.routing import replay_inputs
from real.schedule import Schedule
from real.slab import HostSlab
from real.standin import StandIn
from real.systems import FLAGS, cell_system
from real.timeline import Timeline
from sim.workload import Workload, make_workload
from traces.errors import InputError, nearest
from traces.files import load_trace

Log = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Cell:
    """One run, as plain values: what a JSON file holds."""

    name: str
    trace: str
    """Trace file; where it does not start with /, beside the cells' file."""
    workload: Mapping[str, Any]
    """Arguments of `sim.workload.make_workload`."""
    model: Mapping[str, int]
    """Fields of `real.decoder.ModelShape`."""
    system: Mapping[str, Any]
    """``name``, ``drop_unused_prefetches``, ``reupload_after_use``, and by axis a policy's YAML."""
    slots: int
    warmup: int
    """Steps before the timed ones."""
    steps: int
    """Timed steps, without device marks."""
    marked: int
    """Steps after the timed ones, with device marks."""
    seed: int
    layer_ns: int
    """What the simulator says a decode layer takes; policies may ask."""
    transfer_ns: int
    """What it says a transfer takes."""
    chunk_bytes: int
    window_bytes: int
    """Prefetched bytes that the copy stream is given ahead."""
    preload: bool = False
    """Whether all experts are brought into slots before the first step."""
    one_by_one: bool = True
    """Whether experts compute each as it lands, or all after the last."""
    prove: bool = False
    """Whether the schedule is proved; slow."""
    passes: int = 1
    """How often it runs, each time from the start; of every step's times the quickest counts."""

    @property
    def shape(self) -> ModelShape:
        """The decoder's sizes."""
        return ModelShape(**self.model)


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of a JSON file, their trace paths made whole. Raises InputError for whatever a cell cannot hold."""
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else f"of JSON's type {type(entries).__name__}"
        raise InputError(f"{path} is {found}: it must be a list of cells, at least one")
    cells: list[Cell] = []
    for place, entry in enumerate(entries):
        _check_entry(f"{path}: cell {place}", entry)
        if entry["name"] in (names := [cell.name for cell in cells]):
            raise InputError(
                f"{path}: cell {place}: name is '{entry['name']}', as cell {names.index(entry['name'])} is called"
            )
        cells.append(Cell(**{**entry, "trace": str(path.parent / entry["trace"])}))
    return cells


def check_cells(cells: Sequence[Cell], path: Path) -> None:
    """Build the workload and the system of every cell of `path` once. Raises InputError where a cell could not start."""
    workloads: dict[str, Workload] = {}
    for place, cell in enumerate(cells):
        try:
            arranged = json.dumps([cell.trace, dict(cell.workload)])
            if arranged not in workloads:
                workloads[arranged] = make_workload(load_trace(cell.trace), **cell.workload)
            workload = workloads[arranged]
            _check_steps(cell, workload)
            for name in ("layers", "experts", "top_k"):
                if (routed := getattr(workload.trace.model, name)) != cell.model[name]:
                    raise InputError(f"model.{name} is {cell.model[name]}, but {cell.trace} was recorded with {routed}")
            cell_system(asdict(cell), workload)
        except InputError as error:
            raise InputError(f"{path}: cell {place} ('{cell.name}'): {error}") from error


def _check_entry(where: str, entry: Any) -> None:
    """Raise InputError where the JSON of a cell lacks a field, has an unknown one or one that cannot be right."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}: it must be an object with the fields of a cell")
    named = f"{where} ('{entry['name']}')" if isinstance(entry.get("name"), str) else where
    _check_names(
        named, "", entry, [field.name for field in fields(Cell)], [f.name for f in fields(Cell) if f.default is MISSING]
    )
    for name in ("name", "trace"):
        if not isinstance(entry[name], str) or not entry[name]:
            raise InputError(f"{named}: {name} is {entry[name]!r}: it must be a text")
    for name in ("workload", "model", "system"):
        if not isinstance(entry[name], dict):
            raise InputError(f"{named}: {name} is {entry[name]!r}: it must be an object")
    for name in _SWITCHES & entry.keys():
        _check_switch(named, name, entry[name])
    for name, least in _LEAST.items():
        if name in entry:
            _check_number(named, name, entry[name], least)
    _check_names(named, "workload.", entry["workload"], ("order", "batch", "phases"))
    _check_names(named, "model.", entry["model"], ModelShape._fields, ModelShape._fields)
    for name, value in entry["model"].items():
        _check_number(named, f"model.{name}", value, 0 if name == "shared_width" else 1)
    _check_heads(named, ModelShape(**entry["model"]))
    parts = ("name", *FLAGS, *AXES)
    _check_names(named, "system.", entry["system"], parts, parts)
    if not isinstance(entry["system"]["name"], str):
        raise InputError(f"{named}: system.name is {entry['system']['name']!r}: it must be a text")
    for name in FLAGS:
        _check_switch(named, f"system.{name}", entry["system"][name])
    for axis in AXES:
        if not isinstance(entry["system"][axis], dict):
            raise InputError(f"{named}: system.{axis} is {entry['system'][axis]!r}: it must be an object with _target_")


_SWITCHES = {"preload", "one_by_one", "prove"}
_LEAST = {
    **dict.fromkeys(("slots", "steps", "chunk_bytes", "window_bytes", "passes"), 1),
    **dict.fromkeys(("warmup", "marked", "seed", "layer_ns", "transfer_ns"), 0),
}
"""The least value of every whole number of a cell."""


def _check_names(where: str, prefix: str, given: Iterable[str], known: Sequence[str], needed: Iterable[str] = ()) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{where} has no field '{prefix}{name}': {nearest(name, known)}")
    for name in needed:
        if name not in given:
            raise InputError(f"{where}: {prefix}{name} is missing")


def _check_number(where: str, name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{where}: {name} is {value!r}: it must be a whole number of at least {least}")


def _check_switch(where: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r}: it must be true or false")


def _check_heads(where: str, shape: ModelShape) -> None:
    if shape.hidden % shape.heads:
        raise InputError(f"{where}: model.heads is {shape.heads}, which does not divide model.hidden, {shape.hidden}")


def _check_steps(cell: Cell, workload: Workload) -> None:
    total = cell.warmup + cell.steps + cell.marked
    if total > len(workload.decode):
        raise InputError(f"warmup, steps and marked make {total} steps, but the workload has {len(workload.decode)}")


class Model:
    """Weights of a shape: routed experts in host memory, all else on `where` (``cpu`` or ``cuda``)."""

    def __init__(self, shape: ModelShape, where: str, seed: int = 0) -> None:
        self.shape, self.where = shape, where
        experts = shape.layers * shape.experts
        if where == "cpu":
            self.slab = HostSlab(experts, shape.expert_bytes)
        else:
            from real import cuda

            self.slab = HostSlab(experts, shape.expert_bytes, cuda.register, cuda.unregister)
        try:
            self.slab.fill(seed)
            self.weights = Weights(shape, where, seed)
        except BaseException:
            self.slab.close()
            raise

    def close(self) -> None:
        """Release host memory and weights."""
        self.slab.close()
        del self.weights


@dataclass(frozen=True)
class Measured:
    """What a cell gave."""

    row: dict[str, Any]
    log: Log
    timeline: Timeline
    chosen: Any
    """[S, N] tokens."""
    checksums: Any
    """[S] of the last hidden states."""


def run_cell(cell: Cell, model: Model, device: Device | None = None) -> Measured:
    """Run one cell. `device` is by default the GPU, or on a machine without one a stand-in that runs all at once.

    Raises InputError where memory does not suffice, a copy fails or the device is lost; whatever happens, nothing of the
    cell stays allocated.
    """
    workload = make_workload(load_trace(cell.trace), **cell.workload)
    _check_steps(cell, workload)
    free_device_memory()  # what an exception of an earlier cell still held
    schedule = Schedule(cell.shape.expert_bytes) if cell.prove else None
    with device_errors(f"cell '{cell.name}'"), opened(device, model.where, schedule) as there:
        return _measure(cell, model, workload, there)


def _measure(cell: Cell, model: Model, workload: Workload, device: Device) -> Measured:
    shape, where = model.shape, model.where
    total = cell.warmup + cell.steps + cell.marked
    system = cell_system(asdict(cell), workload)
    slots = int(system.setting.capacity.sum())
    check_room(slots * model.slab.slot_bytes, where)
    pool = SlotPool(shape, slots, where)
    rate = link_rate(device, model.slab, pool.address, slots) if where != "cpu" else float("nan")
    decoder = ReplayDecoder(shape, model.weights, replay_inputs(workload, total), pool, device, where, cell.seed)
    with undisturbed():  # which could free what a capture must not see freed
        decoder.capture()
    log: Log = []
    timeline = Timeline(device, shape.layers)
    executor = Executor(
        Decisions.on_trace(system, workload),
        Shape(total, shape.layers, shape.experts),
        decoder,
        device,
        Memory(pool.address, model.slab.address, model.slab.slot_bytes),
        expert_bytes=shape.expert_bytes,
        chunk_bytes=cell.chunk_bytes,
        window_bytes=cell.window_bytes,
        timeline=timeline,
        log=log,
        one_by_one=cell.one_by_one,
    )
    if cell.preload:
        executor.preload(range(shape.layers * shape.experts))
    with undisturbed():
        executor.run(range(cell.warmup + cell.steps))
        timeline.begin_marks(cell.marked)
        executor.run(range(cell.warmup + cell.steps, total))
    row = {
        **_identity(cell, slots, where),
        **_times(cell, timeline, rate),
        **_counts(executor),
        "decisions_digest": digest(log),
        "outputs_digest": hashlib.sha256(decoder.checksums.cpu().numpy().tobytes()).hexdigest(),
        "distinct_tokens": len(torch.unique(decoder.chosen)),
        "peak_device_bytes": _peak_bytes(where),
    }
    return Measured(row, log, timeline, decoder.chosen.cpu().numpy(), decoder.checksums.cpu().numpy())


def digest(log: Log) -> str:
    """Return a sha256 over the decisions of a log, whenever they happened."""
    return hashlib.sha256(json.dumps([entry[1:] for entry in log]).encode()).hexdigest()


# ---- figures -----------------------------------------------------------------------------------------------------


def _identity(cell: Cell, slots: int, where: str) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "system": cell.system["name"],
        "model": dict(cell.model),
        "slots": slots,
        "warmup": cell.warmup,
        "timed": cell.steps,
        "marked": cell.marked,
        "device": device_name(where),
        "driver": driver_version() if where != "cpu" else None,
        "torch": torch.__version__,
    }


def _times(cell: Cell, timeline: Timeline, rate: float) -> dict[str, Any]:
    """Return times, ns: of the timed steps by the host's clock, of the marked ones by the device's."""
    timed = slice(cell.warmup, cell.warmup + cell.steps)
    found: dict[str, Any] = {
        **_step_times([timeline.step_ns[timed]]),
        "host_per_layer_ns": timeline.host_parts(timed),
        "link_bytes_per_s": rate,
    }
    marked = timeline.device_times()
    if marked is not None:
        found["marked_ns"] = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in marked._asdict().items()
        }
        found["copy_efficiency"] = marked.burst_bytes_per_s / rate
    return found


def _step_times(passes: list[Any]) -> dict[str, Any]:
    """Return of every step the time of the quickest of its `passes`, ns, and what they sum up to.

    All passes do the same work, and other guests of a shared machine only ever make it slower: up to twice for seconds, by
    tens of milliseconds for a step. A step's quickest pass is nearest to what the machine takes when it is left alone.
    """
    step_ns = np.min(passes, axis=0).astype(np.int64)
    return {
        "step_ns": step_ns.tolist(),
        "pass_ns": [each.tolist() if isinstance(each, np.ndarray) else list(each) for each in passes],
        "step_ns_median": float(np.median(step_ns)) if len(step_ns) else float("nan"),
        "step_ns_mean": float(step_ns.mean()) if len(step_ns) else float("nan"),
    }


def _counts(executor: Executor) -> dict[str, Any]:
    counts = executor.outcome()._asdict()
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in counts.items()}


def link_rate(device: Device, slab: HostSlab, address: int, slots: int) -> float:
    """Return bytes/s of back-to-back copies of single experts into `slots` slots at `address`, which hold nothing yet."""
    device.drain()
    copies, size, blocks = 96, slab.expert_bytes, len(slab.blocks)
    rate = 0.0
    for _ in range(3):  # the first train wakes the link up
        start = device.mark(COPY)
        for number in range(copies):
            target = address + number % slots * slab.slot_bytes
            device.copy(target, slab.address + number * 7 % blocks * slab.slot_bytes, size)
        end = device.mark(COPY)
        device.drain()
        rate = max(rate, copies * size / (device.mark_ns(end) - device.mark_ns(start)) * 1e9)
    return rate


# ---- the machine -------------------------------------------------------------------------------------------------


@contextmanager
def opened(given: Device | None, where: str, schedule: Schedule | None) -> Iterator[Device]:
    """Open the device at `where` and close it, with all that was submitted done or dropped; one that is given stays open."""
    if given is not None:
        yield given
    elif where == "cpu":
        yield StandIn("eager", schedule=schedule)
    else:
        from real.cuda import Cuda

        torch.cuda.reset_peak_memory_stats()
        device = Cuda(schedule)
        try:
            yield device
        finally:
            device.close()


@contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Say in one sentence what torch and the driver say in many; wait for the device and free what `what` had."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"{what}: the GPU's memory does not suffice: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if "CUDA" not in str(error) and "cuda" not in str(error):
            raise
        raise InputError(f"{what}: the GPU failed: {str(error).splitlines()[0]}") from error
    finally:
        with suppress(RuntimeError):  # of a device that is lost, which was said already
            free_device_memory()


def free_device_memory() -> None:
    """Wait for the GPU, if there is one, and give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def check_room(size: int, where: str) -> None:
    """Raise InputError where the GPU has not `size` bytes for the slots."""
    if where == "cpu":
        return
    free, _ = torch.cuda.mem_get_info()
    if size > free:
        raise InputError(
            f"the GPU's memory does not suffice: the slots need {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; "
            "lower the budget"
        )


def _peak_bytes(where: str) -> int:
    return torch.cuda.max_memory_allocated() if where != "cpu" else 0


# ---- the command -------------------------------------------------------------------------------------------------


def run_cells(cells: list[Cell], out: Path, *, where: str, minutes: float) -> int:
    """Run cells until the time is up and write their results into the folder `out`; return how many failed.

    ``results.jsonl`` gets a row per cell, ``decisions.jsonl.gz`` its log, ``stamps.jsonl.gz`` host stamps and device marks:
    those of its first pass. A cell that fails in any of its passes has failed: its row is the sentence that says why.
    """
    end = time.monotonic() + minutes * 60
    failed = 0
    for shape, group in groupby(cells, lambda cell: cell.shape):
        of_shape = list(group)
        if time.monotonic() > end:
            print(f"time is up: {of_shape[0].name} and what follows did not run", flush=True)
            break
        failed += _run_shape(of_shape, shape, out, where, end)
    return failed


def _run_shape(cells: list[Cell], shape: ModelShape, out: Path, where: str, end: float) -> int:
    """Run all passes of one shape's cells and write what there is, whatever stops it; return how many failed."""
    passes = Passes(cells)
    try:
        with device_errors(f"shape {tuple(shape)}"):
            model = Model(shape, where)
        try:
            passes.run(model, lambda text: print(text, flush=True), lambda: time.monotonic() > end)
        finally:
            model.close()
    except InputError as error:
        passes.failed = dict.fromkeys(passes.done, str(error))
    finally:
        for cell in cells:
            if cell.name in passes.failed:
                _append(out / "results.jsonl", {"cell": cell.name, "error": passes.failed[cell.name]})
                print(f"{cell.name}: {passes.failed[cell.name]}", flush=True)
            elif passes.done[cell.name]:
                measured = merged(passes.done[cell.name])
                write_result(out, cell, measured)
                print(line(measured.row), flush=True)
    return len(passes.failed)


class Passes:
    """All passes of cells of one shape, which alternate: a machine that is slow for a while is no slow system."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.done: dict[str, list[Measured]] = {cell.name: [] for cell in cells}
        """By cell what its passes gave so far."""
        self.failed: dict[str, str] = {}
        """By cell in which pass it failed, and why; it runs no further."""

    def run(
        self, model: Model, say: Callable[[str], None] = lambda text: None, time_is_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Run what there is time for; `say` is told of every pass."""
        for number in range(1, 1 + max(cell.passes for cell in self.cells)):
            for cell in self.cells:
                if number > cell.passes or cell.name in self.failed or time_is_up():
                    continue
                which = f"pass {number} of {cell.passes}"
                try:
                    self.done[cell.name].append(run_cell(cell, model))
                except InputError as error:
                    self.failed[cell.name] = f"{which}: {error}"
                say(f"{cell.name}: {self.failed.get(cell.name, which)}")


def merged(passes: Sequence[Measured]) -> Measured:
    """Return the quietest pass with every step's quickest time among them all, and the link's rate at its best."""
    quietest = min(passes, key=lambda each: sum(each.row["step_ns"]))
    row = {**quietest.row, **_step_times([each.row["step_ns"] for each in passes])}
    rate = max(each.row["link_bytes_per_s"] for each in passes)
    if "marked_ns" in row:
        row |= {"link_bytes_per_s": rate, "copy_efficiency": row["marked_ns"]["burst_bytes_per_s"] / rate}
    return replace(quietest, row=row)


def make_folder(out: Path) -> None:
    """Make the folder that --out names, if it is not there. Raises InputError where it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out is '{out}': it must be a folder, or one that can be made: {error.strerror}") from error


def write_result(out: Path, cell: Cell, measured: Measured) -> None:
    """Append a cell's row, log and times to the files in `out`."""
    _append(out / "results.jsonl", measured.row)
    ns, what, key, event = (list(column) for column in zip(*measured.log, strict=True)) if measured.log else ([], [], [], [])
    log = {"cell": cell.name, "ns": ns, "what": what, "key": key, "event": event}
    _append_packed(out / "decisions.jsonl.gz", log)
    _append_packed(out / "stamps.jsonl.gz", {"cell": cell.name, **times_of(measured.timeline)})


def times_of(timeline: Timeline) -> dict[str, Any]:
    """Return host stamps and device marks as plain lists."""
    return {
        "stamps": timeline.stamps.tolist(),
        "marks": timeline.device_marks().tolist(),
        "copies": timeline.copy_marks().tolist(),
    }


def line(row: Mapping[str, Any]) -> str:
    """Return a cell's result as one line of text."""
    marked = row.get("marked_ns", {})
    parts = " / ".join(f"{np.mean(marked[name]) / 1e6:.2f}" for name in ("compute", "wait", "host")) if marked else "-"
    host = " ".join(f"{name} {ns / 1e3:.0f}" for name, ns in row["host_per_layer_ns"].items())
    experts = "/".join(str(sum(row[name])) for name in ("hits", "late_hits", "misses"))
    return (
        f"{row['cell']:44} {row['step_ns_mean'] / 1e6:7.2f} ms a step (median {row['step_ns_median'] / 1e6:.2f}), marked: "
        f"compute/wait/host {parts} ms; hits/late/misses {experts}; link {row.get('copy_efficiency', float('nan')):.1%} of "
        f"{row['link_bytes_per_s'] / 1e9:.1f} GB/s; host us a layer: {host}; {row['peak_device_bytes'] / 1e9:.2f} GB"
    )


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _append_packed(path: Path, row: Mapping[str, Any]) -> None:
    with gzip.open(path, "at", compresslevel=6) as file:
        file.write(json.dumps(row) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m real.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no cell after so many minutes")
    parser.add_argument("--where", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args(arguments)
    return ended(lambda: _run(chosen), "the results of all cells that were complete are written")


def _run(chosen: argparse.Namespace) -> int:
    check_gpu(chosen.where)
    cells = read_cells(chosen.cells)
    check_cells(cells, chosen.cells)
    make_folder(chosen.out)
    failed = run_cells(cells, chosen.out, where=chosen.where, minutes=chosen.minutes)
    if chosen.where == "cpu":
        print(f"a {STAND_IN} times nothing: times, rates and shares above mean nothing", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
