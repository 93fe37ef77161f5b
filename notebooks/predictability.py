# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How predictable is a trace?
#
# A prefetch can only be as good as the routing is predictable, and a cache only as good as it repeats itself. Both can be
# measured before any policy is run. In a terminal: `foregate trace inspect FILE`.

# %%
import os
from pathlib import Path

from IPython.display import Image, display
from matplotlib.figure import Figure

from policies.system import find_part
from sim.compare import compare
from sim.config import compose_config
from sim.curves import miss_curve
from sim.experiment import workload_of
from sim.figures import prediction_figure
from traces import inspect_trace

results = Path(os.environ.get("FOREGATE_RESULTS", "../results"))
tokens = os.environ.get("FOREGATE_TOKENS", "null")  # how many of the trace's tokens to take; null is all
name = "reference"  # or second_reference, or a file: trace=PATH

config = compose_config("simulate", [f"trace={name}", f"trace.tokens={tokens}"])
workload = workload_of(config)
trace = workload.trace
model = trace.model
print(f"{trace.tokens:,} tokens, {model.layers} layers, {model.experts} experts, top-{model.top_k}: {trace.provenance.kind}")

# %% [markdown]
# ## What the router gives away
#
# *Overlap*: how many of a token's experts its request used n tokens earlier; what is above chance is what a cache lives
# on. *Foretold*: how many of a layer's experts its own gate names when it is given the input of an earlier layer; what a
# cross-layer predictor lives on.

# %%
found = inspect_trace(trace)
print(f"chance: {found.overlap.chance:.3f}")
for lag, share in zip(found.overlap.lags, found.overlap.mean, strict=True):
    print(f"shared with the token {lag:>3} back: {'-' if share is None else f'{share:.3f}'}")
if found.recall is not None:
    for ahead, shares in enumerate(found.recall.mean, start=1):
        cells = [
            f"best {width}: {'-' if share is None else f'{share:.3f}'}"
            for width, share in zip(found.recall.widths, shares, strict=True)
        ]
        print(f"foretold {ahead} layers ahead, {', '.join(cells)}")

# %% [markdown]
# ## What predictors make of it
#
# The same routing, seen by whole predictors: how much of what each predicts is needed, and how much of what is needed it
# predicts. Repetition (`previous_token`) and habit (`transition`, `popularity`) stay below half where the gate of the
# layer before (`next_gate`) names most.

# %%
systems = ["previous_token", "popularity", "transition", "next_gate", "fate"]
overrides = [
    f"trace={name}",
    f"trace.tokens={tokens}",
    f"systems=[{','.join(systems)}]",
    "budget=0.25",
    f"results='{results}'",
    "jobs=1",
]
rows, _ = compare(overrides)
display(Image(prediction_figure(rows, results / "figures" / "predictability.png").read_bytes(), width=900))

# %% [markdown]
# ## What caches make of it
#
# Misses without any time or prefetch, at every size. Between LRU and Belady's policy, which knows the future, lies all
# that eviction can win. LRU misses everything below one token's worth of experts: the layers come round in a cycle.

# %%
sizes = [0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1]
slots = [max(1, int(size * model.layers * model.experts)) for size in sizes]
figure = Figure(figsize=(7, 4), layout="constrained")
axis = figure.subplots()
for policy, look in (("lru", "o-"), ("lrfu", "s-"), ("belady", "k.--")):
    part = find_part("eviction", compose_config("simulate", [f"eviction={policy}"])["eviction"])
    curve = miss_curve(part, workload.events, slots)
    axis.plot([100 * size for size in sizes], [100 * one.misses / one.accesses for one in curve], look, label=policy)
axis.set(xlabel="cache, % of all experts", ylabel="misses, % of the experts needed", xlim=(0, 102), ylim=(0, 103))
axis.legend()
axis.grid(alpha=0.3)
path = results / "figures" / "misses.png"
figure.savefig(path, dpi=150)
display(Image(path.read_bytes(), width=700))

# %% [markdown]
# ## Which layers are hard
#
# The share of each layer's experts that the layer before foretells: the first layers are foretold worst, in this model as
# in published ones.

# %%
if found.recall is not None:
    for layer, share in enumerate(found.recall.by_layer[0][0], start=1):
        print(f"layer {layer:>3}: {'-' if share is None else '#' * round(50 * share) + f' {share:.3f}'}")
