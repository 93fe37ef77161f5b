# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Simulation against reality
#
# A simulator is worth what its error is known to be. The same decisions were run on a GPU (`real/ground_truth/`), step by
# step, and every committed run can be simulated again and put beside its measurement. In a terminal: `foregate validate`.

# %%
import json
import os
import tempfile
from pathlib import Path

from IPython.display import Image, display

from real.validation.command import GROUND_TRUTH, ground_truth
from real.validation.comparison import compare_cell, find_trace, simulated_spans
from real.validation.measured import read_measured
from sim.figures import agreement_figure
from sim.hardware import make_hardware
from sim.timeline import Recording, write_timeline

machine, summary = ground_truth()[0]
folder = GROUND_TRUTH / machine
print(f"{len(summary['cells'])} runs measured on {machine}")
print(f"error of a step: mean {summary['mean_error']:.1%}, worst {summary['worst_error']:.1%}")
print(f"agreement on the order of systems (Kendall's tau, 1 is the same order): {summary['kendall_tau']:.2f}")

# %% [markdown]
# ## All runs
#
# Blue is the simulator deciding and timing by itself. Hollow diamonds are the decisions that the GPU's own run took,
# priced by the simulator: what remains wrong there is the hardware model, what is added is decisions that differ. Red
# squares are the three anchors: everything resident, everything missing, perfect prefetch.

# %%
out = Path(os.environ.get("FOREGATE_RESULTS") or tempfile.mkdtemp())
display(Image(agreement_figure(summary["cells"], machine, out / "figures" / "reality.png").read_bytes(), width=900))

# %% [markdown]
# ## Where the time of one run went
#
# One run in full: its parts measured and simulated, with the decisions as measured. The errors are shares of the measured
# step, so those of compute, wait and host add up to its error. Parts are those of the steps with device marks, in one pass;
# milliseconds a token are of the steps without, each at its quickest pass: the parts add up to a little more.

# %%
hardware = make_hardware(json.loads((folder / "hardware.json").read_text()))
run = read_measured(folder / "olmoe_1b_7b_lru_0p25.json")
trace = find_trace(run, folder)
report = compare_cell(run, trace, hardware)
found, real = report.closed_loop.tpot_ns / 1e6, report.measured_tpot_ns / 1e6
print(f"{report.name}: {real:.2f} ms a token measured, {found:.2f} simulated")
for part in report.open_loop.components:
    measured, simulated = part.measured_ns / 1e6, part.simulated_ns / 1e6
    print(f"  {part.name:10} measured {measured:6.2f} ms, simulated {simulated:6.2f} ms, error {part.error:+.1%}")
print(f"decisions differ in {report.divergence.differing} of {report.divergence.events} events")

# %% [markdown]
# ## Both side by side
#
# The last steps of both runs as a timeline, compute stream, host thread and link of each: drop the file into
# <https://ui.perfetto.dev>, which reads it in the browser.

# %%
shape, steps = run.cell["model"], int(run.steps["step"].max()) + 1
measured, simulated = report.logs
runs = {
    f"measured: {report.name}": Recording(measured, run.spans),
    f"simulated: {report.name}": Recording(simulated, simulated_spans(run, trace, hardware)),
}
path = write_timeline(out / "reality.json.gz", runs, shape["layers"], shape["experts"], range(steps - 4, steps))
print(f"{path.name}: {path.stat().st_size:,} bytes")
