"""Calibration: measure this machine and write a hardware profile. ``python -m real.calibration --out FILE`` needs no Hydra.

A written profile names a base: Hydra takes from it, tags included, every constant that was not measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from real.calibration.fitting import Summary, fit_kernel, fit_train, overhead_ns, rising, slowdown, summary
from real.calibration.measure_host import EXPERT, HostTimes, measure_host
from real.driver import driver_version
from traces.atomic import write_atomically
from traces.errors import InputError

if TYPE_CHECKING:
    from real.calibration.measure_executor import ShapeTimes
    from real.calibration.measure_gpu import GpuTimes

BASE = "h100_pcie5"
"""The profile whose constants stand where this machine was not measured."""

READOUTS = ("mapped word", "copy and event", ".cpu()")
"""Ways to read the router, the one that the executor uses first."""

Say = Callable[[str], None]


class Entry(NamedTuple):
    """One measured constant of a profile."""

    value: int | list[tuple[int, int]]
    unit: str
    source: str
    spread: Any = None
    """[p10, p90], or one such pair per point of a curve; None for what was fitted to several measurements."""
    tag: str = "measured"


def calibrate(out: str | os.PathLike[str], base: str = BASE, say: Say = lambda what: None) -> list[str]:
    """Measure this machine in under two minutes, write the profile `out` and return sentences about what is missing.

    The profile is named after the file, NAME.yaml. It is written at the end and at once: an interrupted calibration leaves
    nothing. Raises InputError where `out` cannot be a profile's file, and where the GPU cannot be measured.
    """
    path = checked_path(out, base)
    machine = machine_facts()
    times, shapes, gpu_notes = _gpu(say)
    say("experts on the CPU, memory, disk")
    host = measure_host(path.parent)
    entries = {} if times is None else gpu_constants(times) | executor_constants(shapes)
    figures = host_figures(host) | ({} if times is None else gpu_figures(times) | executor_figures(shapes))
    if times is not None:
        machine |= gpu_facts()
        entries["device.memory_bytes"] = Entry(machine["memory_bytes"], "bytes", "as the driver states it")
    write_atomically(path, profile_text(path.stem, base, entries, machine | {"measured": figures}).encode())
    return [*gpu_notes, *host.notes]


def checked_path(out: str | os.PathLike[str], base: str) -> Path:
    """Return the file to write, its folder made; raises InputError for names that Hydra cannot choose, or a bad folder."""
    path = Path(out)
    if path.suffix != ".yaml" or not re.fullmatch(r"[A-Za-z0-9_]+", path.stem):
        raise InputError(f"out is '{out}': it must be a file NAME.yaml whose name has only letters, digits and '_'")
    if not re.fullmatch(r"[A-Za-z0-9_]+", base):
        raise InputError(f"base is '{base}': it must be the name of a profile, such as {BASE}")
    if path.stem == base:
        raise InputError(f"out is '{out}': a profile cannot be its own base; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out is '{out}': the folder {path.parent} cannot be made: {error.strerror}") from error
    return path


def _gpu(say: Say) -> tuple[GpuTimes | None, Mapping[str, ShapeTimes], tuple[str, ...]]:
    """Measure the GPU and the executor on it, or say why there is none."""
    kept = "the constants of GPU and link stay the base's"
    try:
        import torch
    except ImportError:
        return None, {}, (f"torch is not installed, so no GPU was measured: {kept}",)
    if not torch.cuda.is_available():
        return None, {}, (f"there is no GPU that torch can use: {kept}",)
    from real.calibration.measure_executor import MODELS, measure_executor
    from real.calibration.measure_gpu import measure_gpu

    try:
        times = measure_gpu(say)
    except RuntimeError as error:
        raise InputError(f"the GPU could not be measured: {str(error).splitlines()[0]}") from error
    return times, measure_executor(MODELS, say), times.notes


# ---- what machine it is ------------------------------------------------------------------------------------------


def machine_facts() -> dict[str, Any]:
    """Return processor, system and versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def gpu_facts() -> dict[str, Any]:
    """Return device, driver and versions of the current CUDA device."""
    import torch

    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- from samples to constants -----------------------------------------------------------------------------------


def gpu_constants(times: GpuTimes) -> dict[str, Entry]:
    """Return the constants that a GPU's times determine, by ``group.constant``."""
    isolated = {size: summary(trains[1]) for size, trains in times.h2d.items()}
    experts = [(count, size, summary(samples).median) for count, size, samples in times.experts.values()]
    kernel = fit_kernel(experts)
    layers = [(size, summary(samples).median) for size, samples in times.attention.values()]
    head_bytes, head = times.head
    operations, products = times.gemm
    method = next(name for name in READOUTS if name in times.readout)
    fitted = f"fitted to the top-k experts of {len(experts)} models in a CUDA graph at batch 1, within {kernel.worst:.0%}"
    return {
        "link.h2d": Entry(
            rising({size: found.median for size, found in isolated.items()}),
            "[bytes, ns]",
            "isolated copies from registered memory, submitted before they start, by events, median of "
            f"{_counts(isolated.values())}, the quietest of 3 rounds",
            [_pair(found) for _, found in sorted(isolated.items())],
        ),
        "link.h2d_train": _train_entry(times.h2d),
        "compute.memory_bandwidth": Entry(round(kernel.bytes_per_s), "bytes/s", fitted),
        "compute.expert_launch_ns": Entry(round(kernel.launch_ns), "ns", f"{fitted}, with memory_bandwidth"),
        "compute.flops": Entry(
            round(operations / summary(products).median * 1e9), "flop/s", "bf16 products of 8192 x 8192 matrices, median"
        ),
        "compute.layer_launch_ns": Entry(
            round(overhead_ns(layers, kernel.bytes_per_s)),
            "ns",
            f"attention and gate of OLMoE's layer in a CUDA graph at {', '.join(map(str, times.attention))} cached tokens, "
            "less their bytes over memory_bandwidth",
        ),
        "compute.step_launch_ns": Entry(
            round(overhead_ns([(head_bytes, summary(head).median)], kernel.bytes_per_s)),
            "ns",
            "OLMoE's last norm, head and argmax in a CUDA graph, less their bytes over memory_bandwidth",
        ),
        "host.readout_ns": _number(
            times.readout[method], f"from a gate's end until the host knows, launch latency included, by {method}"
        ),
        "host.gate_issue_ns": _number(times.calls["graph launch"], "one CUDA graph launch from Python"),
    }


def executor_constants(shapes: Mapping[str, ShapeTimes]) -> dict[str, Entry]:
    """Return the constants of the executor's own kernels and host thread, by name; none where no shape was measured.

    Device spans stand as they are between their marks, gaps and all, so that they add up to a step: a mark costs a step 0.1
    to 0.4 microseconds, as it fits into a gap between launches that is there without it. A step has a gap before each
    attention and one before its end; that before its first attention is taken to be as long as the others. Of a group of n
    experts n times `expert_ns` and `group_ns` are made so that one that was waited for, and all of a token's that were
    there, take what they took.
    """
    if not shapes:
        return {}
    entries: dict[str, Entry] = {}
    beside, readouts, residents, ahead = [], [], [], []
    for name, times in shapes.items():
        gap = summary(times.gap).median
        alone = {length: summary(samples).median for length, samples in times.attention.items()}
        (_, one), (top_k, all_of_them) = ((count, summary(samples).median) for count, samples in times.groups.items())
        waited = one + summary(times.landing_to_experts).median
        expert_ns = max(1.0, (all_of_them - waited) / (top_k - 1))
        by = f"in the executor's own graphs, median of {len(times.attention_beside)}, the quietest of 3 rounds"
        entries |= {
            f"models.{name}.attention": Entry(
                rising({length: gap + time for length, time in alone.items()}),
                "[tokens, ns]",
                f"attention and gate of a layer, from the end of the experts before, {by}, by length of the KV cache",
            ),
            f"models.{name}.shared_ns": Entry(round(summary(times.shared).median), "ns", f"shared experts of a layer {by}"),
            f"models.{name}.group_ns": Entry(
                round(max(0.0, waited - expert_ns)), "ns", f"one routed expert, from its landing on, {by}, less expert_ns"
            ),
            f"models.{name}.expert_ns": Entry(
                round(expert_ns), "ns", f"what each of {top_k} experts adds to a group {by}, from one that was waited for"
            ),
            f"models.{name}.step_ns": Entry(
                round(gap + summary(times.step).median), "ns", f"embedding, last norm, head and argmax {by}"
            ),
        }
        beside += [
            summary(times.attention_beside).median - alone[min(alone)],
            summary(times.group_beside).median - one,
        ]
        readouts.append(summary(times.gate_to_copy).median)
        if summary(times.shared).median == 0:  # else the host has decided before the shared experts end
            residents.append(summary(times.gate_to_residents).median)
        ahead.append(summary(times.ahead).median)
    copies, experts = _middle(readouts), _middle(residents or readouts)
    readout = max(0.0, min(copies, experts))
    of = f"of {len(shapes)} models in the executor, median"
    return entries | {
        "compute.beside_ns": Entry(
            round(max(0.0, _middle(beside))),
            "ns",
            f"by how much attention and single experts {of}, take longer beside copies",
        ),
        "link.chunk_bytes": Entry(4 << 20, "bytes", "as the executor sends prefetches", tag="assumed"),
        "link.committed_chunks": Entry(1, "chunks", "as the executor sends prefetches", tag="assumed"),
        "host.readout_ns": Entry(
            round(readout),
            "ns",
            f"from a gate's end until the first copy of what is missing begins, {of}, or until residents compute if that is "
            "sooner; the host's decision is part of it",
        ),
        "host.expert_issue_ns": Entry(
            round(max(0.0, experts - readout)),
            "ns",
            f"from a gate's end until residents compute, of {len(residents or readouts)} models in the executor, median, "
            "less readout_ns",
        ),
        "host.demand_issue_ns": Entry(
            round(max(0.0, copies - readout)),
            "ns",
            f"from a gate's end until the first copy of what is missing begins, {of}, less readout_ns",
        ),
        "host.ahead_ns": Entry(round(max(0.0, _middle(ahead))), "ns", f"what predicting one layer more takes, {of}"),
        "host.gate_issue_ns": _number(
            [sample for times in shapes.values() for sample in times.gate_issue],
            "a layer's attention and gate in the executor",
        ),
        "host.step_ns": _number(
            [sample for times in shapes.values() for sample in times.step_issue],
            "from a step's last experts to the next step's first gate in the executor",
        ),
    }


def _middle(values: Sequence[float]) -> float:
    return summary(values).median


def _train_entry(h2d: Mapping[int, Mapping[int, Sequence[float]]]) -> Entry:
    """Return the curve of a copy inside a train; its spread is that of the longest trains."""
    points, spreads = {}, []
    for size in sorted(h2d):
        medians = {count: summary(samples).median for count, samples in h2d[size].items()}
        points[size] = fit_train(medians).copy_ns
        longest = max(medians)
        each = [(sample - medians[1]) / (longest - 1) for sample in h2d[size][longest]]
        spreads.append(_pair(summary([max(0.0, time) for time in each])))
    counts = " and ".join(str(count) for count in sorted(next(iter(h2d.values()))) if count > 1)
    return Entry(
        rising(points),
        "[bytes, ns]",
        f"what a copy adds to trains of {counts} from registered memory, least squares through the isolated copy; h2d minus "
        "this is what waking the link costs",
        spreads,
    )


def _number(samples: Sequence[float], source: str) -> Entry:
    found = summary(samples)
    return Entry(round(found.median), "ns", f"{source}, median of {found.samples}", _pair(found))


def _pair(found: Summary) -> list[int]:
    return [max(0, round(found.p10)), max(0, round(found.p90))]


def _counts(found: Any) -> str:
    counts = sorted({each.samples for each in found})
    return " or ".join(map(str, counts))


# ---- figures that the memory model does not use ------------------------------------------------------------------


def gpu_figures(times: GpuTimes) -> dict[str, Any]:
    """Return everything else that was measured on the GPU: [median, p10, p90] in ns unless the name says otherwise."""
    copied, copies = times.device_copy
    return {
        "h2d_trains": {str(size): {str(n): _three(t) for n, t in trains.items()} for size, trains in times.h2d.items()},
        "d2h": {str(size): _three(samples) for size, samples in times.d2h.items()},
        "readout": {name: _three(samples) for name, samples in times.readout.items()},
        "calls": {name: _three(samples) for name, samples in times.calls.items()},
        "slowdown": {name: round(slowdown(*samples), 4) for name, samples in times.contention.items()},
        "experts_in_a_graph": {name: _three(samples) for name, (_, _, samples) in times.experts.items()},
        "experts_eager": {name: _three(samples) for name, samples in times.experts_eager.items()},
        "olmoe_expert_by_tokens": {str(tokens): _three(samples) for tokens, samples in times.expert_tokens.items()},
        "attention_by_context": {str(context): _three(samples) for context, (_, samples) in times.attention.items()},
        "attention_eager": _three(times.attention_eager),
        "head": _three(times.head[1]),
        "device_copy_bytes_per_s": round(copied / summary(copies).median * 1e9),
    }


def executor_figures(shapes: Mapping[str, ShapeTimes]) -> dict[str, Any]:
    """Return all samples of the executor as [median, p10, p90] in ns, by model."""
    return {
        f"executor_{name}": {
            part: _three(samples)
            if isinstance(samples, list)
            else {str(count): _three(each) for count, each in samples.items()}
            for part, samples in times._asdict().items()
        }
        for name, times in shapes.items()
    }


def host_figures(host: HostTimes) -> dict[str, Any]:
    """Return what the host does without a GPU."""
    copied, copies = host.memory_copy
    figures: dict[str, Any] = {"host_copy_bytes_per_s": round(copied / summary(copies).median * 1e9)}
    if host.cpu_expert is not None:
        hidden, width = EXPERT
        figures[f"cpu_expert_{hidden}x{width}_bf16"] = _three(host.cpu_expert)
        figures["cpu_expert_bytes_per_s"] = round(6 * hidden * width / summary(host.cpu_expert).median * 1e9)
    if host.disk_read is not None:
        read, reads = host.disk_read
        figures["disk_read_bytes_per_s"] = round(read / summary(reads).median * 1e9)
    return figures


def _three(samples: Sequence[float]) -> list[int]:
    found = summary(samples)
    return [round(found.median), round(found.p10), round(found.p90)]


# ---- the file ----------------------------------------------------------------------------------------------------


def profile_text(name: str, base: str, entries: Mapping[str, Entry], machine: Mapping[str, Any]) -> str:
    """Return the YAML of a profile: `entries` are measured, all else is the base's. Values are JSON, which YAML reads."""
    what = machine.get("device", "No GPU was measured")
    lines = [
        f"# {what}, {machine['processors']} processors ({machine['processor']}): measured by `foregate calibrate` on",
        f"# {machine['date']}; constants that do not stand here are those of {base}, with its tags.",
        "defaults:",
        f"  - {base}",
        "  - _self_",
        "",
        f"name: {name}",
    ]
    for group in dict.fromkeys(key.rpartition(".")[0] for key in entries):
        *above, own = group.split(".")
        if above and f"{above[0]}:" not in lines:
            lines += ["", f"{above[0]}:"]
        margin = "  " * len(above)
        lines += [*([] if above else [""]), f"{margin}{own}:"]
        for key, entry in entries.items():
            if key.rpartition(".")[0] == group:
                lines += [f"{margin}  {key.rpartition('.')[2]}:", *(margin + line for line in _entry_lines(entry))]
    lines += ["", "machine:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in machine.items() if key != "measured"]
    lines += ["  measured: # ns as [median, p10, p90] unless the name says otherwise"]
    lines += [f"    {key}: {json.dumps(value)}" for key, value in machine.get("measured", {}).items()]
    return "\n".join(lines) + "\n"


def _entry_lines(entry: Entry) -> list[str]:
    fields = {"value": entry.value, "unit": entry.unit, "tag": entry.tag, "source": entry.source}
    if entry.spread is not None:
        fields["spread"] = entry.spread
    return [f"    {key}: {json.dumps(value)}" for key, value in fields.items()]


def tell(what: str) -> None:
    """Say something to whoever waits."""
    print(what, file=sys.stderr, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a calibration from the command line; return 0, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m real.calibration", description="Measure this machine.")
    parser.add_argument("--out", required=True, help="NAME.yaml, such as conf/hardware/NAME.yaml")
    parser.add_argument("--base", default=BASE, help="profile whose constants stand where nothing was measured")
    options = parser.parse_args(arguments)
    try:
        for sentence in calibrate(options.out, options.base, tell):
            tell(sentence)
    except InputError as error:
        tell(f"calibration: {error}")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        tell(f"calibration: {error.filename}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        tell("calibration: interrupted; nothing was written")
        return 130
    print(options.out)  # noqa: T201
    return 0
