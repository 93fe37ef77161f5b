"""Kill a sweep again and again, and see that nothing is lost: ``python tests/killing.py --kills 20``."""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from sim import store
from traces.errors import InputError

SWEEP = [sys.executable, "-m", "sim.cli", "sweep"]


class Sweep:
    """A sweep in processes of its own, which may be killed."""

    def __init__(self, words, results):
        self.process = subprocess.Popen(
            [*SWEEP, *words, f"results={results}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self):
        """The processes that run points, without joblib's own helpers."""
        found = []
        for child in children(self.process.pid):
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"popen_loky" in command:
                found.append(child)
        return found

    def runs(self):
        return self.process.poll() is None

    def kill(self, what, choose):
        """Kill the driver, or one of the workers where there are some; say which it was."""
        workers = self.workers() if what == "worker" else []
        victim = choose.choice(workers) if workers else self.process.pid
        os.kill(victim, signal.SIGKILL)
        if not workers:
            self.process.wait()
        return "worker" if workers else "driver"

    def finish(self):
        """Wait for the end and return how many points it says it computed."""
        out, err = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, err
        return int(re.search(r"(\d+) of them computed now", out)[1])

    def end(self):
        """Stop what is left of it: workers outlive a driver that was killed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def stored(results):
    """Keys of all stored rows, which are read whole; a file that is not would be refused."""
    try:
        return set(store.read_rows(results)["key"])
    except InputError as error:
        if "no results" not in str(error):
            raise
        return set()


def kill_and_resume(words, results, moments, choose):
    """Kill a sweep at each of `moments`, pairs of what to kill and a test of how far it is, and resume it to the end.

    Returns what was killed, with the number of rows stored at that moment.
    """
    started = [Sweep(words, results)]
    killed = []
    try:
        for what, ready in moments:
            begun = time.monotonic()
            seen = stored(results)
            while started[-1].runs():
                far_enough = ready(len(seen), time.monotonic() - begun)
                if far_enough and (what == "driver" or started[-1].workers()):
                    break
                now = stored(results)
                assert seen <= now, "a row that was stored is gone"
                seen = now
                time.sleep(0.02)
            if not started[-1].runs():
                break
            victim = started[-1].kill(what, choose)
            killed.append((victim, len(seen)))
            assert seen <= stored(results)
            if victim == "driver":
                before = stored(results)
                started.append(Sweep(words, results))
        computed = started[-1].finish()
        if killed and killed[-1][0] == "driver":
            assert computed <= len(stored(results)) - len(before), "what was stored was computed again"
    finally:
        for sweep in started:
            sweep.end()
    return killed


def same_table(results, clean):
    """Refuse anything but the rows of an undisturbed sweep, each once, in whole files."""
    found, expected = store.read_rows(results), store.read_rows(clean)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    for path in (Path(results) / "rows").glob("[!.]*.parquet"):
        assert store._wrong(path) is None, path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="of the sweep")
    arguments = parser.parse_args()
    words = arguments.words or [
        "trace.tokens=200",
        "axes.system=[lru,lfu,lrfu,s3fifo,next_gate_lrfu]",
        "axes.link_gb_per_s=[6,12,25,50,100]",
        "axes.budget=[0.2,0.3,0.4,0.5]",
        "axes.seed=[0,1,2,3,4,5,6,7,8,9]",
    ]
    choose = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        clean, results = Path(folder) / "clean", Path(folder) / "killed"
        begun = time.monotonic()
        total = Sweep(words, clean).finish()
        print(f"undisturbed: {total} points in {time.monotonic() - begun:.0f} s")
        killed = []
        while len(killed) < arguments.kills:
            # Half of the moments by what is stored, so that they fall into the work, half by the clock, start included.
            moments = []
            for number in range(len(killed), arguments.kills):
                what = ("worker", "driver")[number % 2]
                more, after = choose.uniform(0, total / 12), choose.uniform(0, 8)
                floor = choose.choice([True, False])
                moments.append((what, by_rows(more) if floor else by_clock(after)))
            found = kill_and_resume(words, results, moments, choose)
            same_table(results, clean)
            killed += found
            print(f"resumed to the identical table of {total} rows after kills of: {found}", flush=True)
            for path in [] if len(killed) >= arguments.kills else (results / "rows").iterdir():
                path.unlink()
        drivers = sum(what == "driver" for what, _ in killed)
        print(
            f"{len(killed)} kills, {drivers} of the driver and {len(killed) - drivers} of workers: nothing lost or doubled"
        )


def by_rows(more):
    start = []

    def ready(rows, seconds):
        start.append(rows)
        return rows >= start[0] + more

    return ready


def by_clock(after):
    return lambda rows, seconds: seconds >= after


if __name__ == "__main__":
    main()
