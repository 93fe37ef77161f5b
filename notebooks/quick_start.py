# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start
#
# Which policy should keep a Mixture-of-Experts model's experts on a GPU that does not hold them all? This ranks a few
# systems on a bundled recording of a small model's routing, at a quarter of the experts' memory, on a simulated H100.
# Nothing here needs a GPU.
#
# A terminal does the same: `foregate compare 'systems=[...]' budget=0.25`.

# %%
import os
from pathlib import Path

from IPython.display import Image, Markdown, display

from sim.compare import compare
from sim.figures import ranking_figure, time_figure
from sim.report import ranking_markdown

results = Path(os.environ.get("FOREGATE_RESULTS", "../results"))
tokens = os.environ.get("FOREGATE_TOKENS", "null")  # how many of the trace's tokens to take; null is all

systems = ["lru", "lrfu", "fate", "next_gate_lrfu", "load_on_demand", "belady", "clairvoyant"]
settings = [f"trace.tokens={tokens}", f"results='{results}'", "jobs=1"]
rows, left_out = compare([*settings, f"systems=[{','.join(systems)}]", "budget=[0.25,0.5]"])
print(f"{len(rows)} results; left out: {left_out or 'none'}")

# %% [markdown]
# ## The ranking
#
# Left to right: how fast is each system, what limits it, is it the policy or the working set, how far is it from the best
# that any policy could do (`clairvoyant` knows the future), and is the difference to plain LRU real? `docs/results.md`
# explains every column.

# %%
display(Markdown(ranking_markdown(rows[rows["budget"] == 0.25])))

# %% [markdown]
# ## What limits them
#
# Bars are the time of one token. Blue no policy can shorten; orange is the wait for the host; red is the wait for experts
# to cross the link, which is what prediction, prefetch and caching are about.

# %%
display(Image(ranking_figure(rows, results / "figures" / "quick_start.png").read_bytes(), width=900))

# %% [markdown]
# Twice the memory helps every system, but not equally:

# %%
display(Image(time_figure(rows, results / "figures" / "quick_start_time.png").read_bytes(), width=900))

# %% [markdown]
# ## Swap one part
#
# A system is a predictor, a prefetch rule, an eviction policy, an allocation of slots to layers, and what a miss does.
# Any of them can be swapped. Here Fate's predictor works with another cache:

# %%
swapped, _ = compare([*settings, "systems=[fate]", "eviction=lrfu", "budget=0.25"])
for row in (rows[(rows["system"] == "fate") & (rows["budget"] == 0.25)].iloc[0], swapped.iloc[0]):
    print(f"{row['system']}: {row['tokens_per_s']:.1f} tokens/s, {row['hit_rate']:.1%} hits")
