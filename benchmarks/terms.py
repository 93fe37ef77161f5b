"""What each term of the memory model that a GPU taught is worth: errors on the ground truth with it left out.

``python -m benchmarks.terms`` prints the tables in docs/validation.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np

from real.validation.command import GROUND_TRUTH, read_json
from real.validation.comparison import compare_cell, find_trace
from real.validation.measured import read_folder
from sim.hardware import Hardware, make_hardware


def without_terms(hardware: Hardware) -> dict[str, Hardware]:
    """Return the profile as it is, and without each of the terms."""

    one_by_one = {
        name: times._replace(group_ns=0, expert_ns=times.group_ns + times.expert_ns)
        for name, times in hardware.models.items()
    }
    plain = replace(hardware, models={}, beside_ns=0, committed_chunks=0, demand_issue_ns=0, ahead_ns=0)
    return {
        "as it is": hardware,
        "no times of single models: bytes and flops": replace(hardware, models={}),
        "no groups: every expert as if it ran alone": replace(hardware, models=one_by_one),
        "kernels as quick beside a busy link (`beside_ns`)": replace(hardware, beside_ns=0),
        "a demand needs no host time (`host_demand_ns`)": replace(hardware, demand_issue_ns=0),
        "chunks can be called back (`committed_chunks`)": replace(hardware, committed_chunks=0),
        "looking ahead costs nothing (`host_ahead_ns`)": replace(hardware, ahead_ns=0),
        "trains cost what isolated copies cost (`h2d_train`)": replace(hardware, h2d_train=None),
        "none of these terms": replace(plain, h2d_train=None),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.terms", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(arguments)
    try:
        _print_tables()
    except KeyboardInterrupt:
        print("interrupted; the tables above are not whole", file=sys.stderr)
        return 130
    return 0


def _print_tables() -> None:
    """Print a Markdown table per GPU."""
    for folder in sorted(GROUND_TRUTH.iterdir()):
        print(f"\n| left out, {folder.name} | mean error | worst | worst cell |\n|---|---:|---:|---|")
        runs = [(run, find_trace(run, folder)) for run in read_folder(folder)]
        for what, hardware in without_terms(make_hardware(read_json(folder / "hardware.json"))).items():
            reports = [compare_cell(run, trace, hardware) for run, trace in runs]
            errors = np.abs([report.closed_loop.error for report in reports])
            print(
                f"| {what} | {errors.mean():.1%} | {errors.max():.1%} | {reports[int(errors.argmax())].name} |", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
