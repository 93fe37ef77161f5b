"""How long a study of a thousand points takes, and how much of that is not simulation: ``python -m benchmarks.study``."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import gpt_oss, machine
from sim.experiment import simulate
from sim.study import plan, read_study

AXES = [
    "axes.system=[arc,belady,clairvoyant,lfu,lrfu,lru,popularity,previous_token,s3fifo,transition]",
    "axes.hardware=[h100_pcie5,h100_pcie5_transformers,rtx3090_pcie4,gtx1080ti_pcie3]",
    "axes.budget=[0.2,0.3,0.4,0.5,0.7]",
    "axes.seed=[0,1,2,3,4]",
]
"""10 systems x 4 machines x 5 budgets x 5 seeds."""


def main() -> None:
    """Run the study, run it again when all is stored, and run its points bare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--every", type=int, default=1, help="run only each so-manieth point bare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace, what = gpt_oss(Path(folder), arguments.tokens)
        words = [*trace, *AXES, "study=thousand"]
        sweep(words, Path(folder) / "first")  # compiles what is not compiled yet
        results = Path(folder) / "results"
        cold = sweep(words, results)
        again = sweep(words, results)
        study = plan([f"++{word}" if word.startswith("axes") else word for word in [*words, f"results={results}"]])
        points = study.points[:: arguments.every]
        for point in points[:: max(1, len(points) // 40)]:  # loads the compiled code
            simulate({**point.config, "results": str(Path(folder) / "warm")})
        start = time.process_time()
        for point in points:
            simulate({**point.config, "results": str(Path(folder) / "bare")}, resume=False)
        bare = (time.process_time() - start) * len(study.points) / len(points)
        start = time.perf_counter()
        rows = read_study(results, "thousand")
        reading = time.perf_counter() - start
    print(f"{machine()}; {len(rows)} points on {what}")
    for name, (seconds, cpu) in (("the sweep", cold), ("the same again, when all is stored", again)):
        print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of processor time in all processes")
    print(
        f"its points in one process, one after another: {bare:.1f} s of processor time, {1e3 * bare / len(rows):.1f} ms each"
    )
    print(f"reading all its rows: {reading:.2f} s")


def sweep(words: list[str], results: Path) -> tuple[float, float]:
    """Return the seconds of a sweep as a command, and its processor seconds, those of its workers included."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sim.cli", "sweep", *words, f"results={results}"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


if __name__ == "__main__":
    main()
