# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choosing a budget
#
# How much GPU memory should the experts get, and which system makes the most of it? Budgets are shares of all experts'
# bytes, or bytes (`4GB`). In a terminal: `foregate compare 'budget=[0.125,0.25,0.5]'`, then `foregate report
# figure=budget_curve`.

# %%
import os
from pathlib import Path

from IPython.display import Image, Markdown, display

from sim.compare import compare
from sim.figures import budget_figure, ranking_figure
from sim.report import ranked, ranking_markdown

results = Path(os.environ.get("FOREGATE_RESULTS", "../results"))
tokens = os.environ.get("FOREGATE_TOKENS", "null")  # how many of the trace's tokens to take; null is all

systems = ["lru", "lrfu", "next_gate_lrfu", "fate", "belady", "clairvoyant"]
budgets = [0.125, 0.1875, 0.25, 0.375, 0.5, 0.75]
rows, _ = compare(
    [
        f"trace.tokens={tokens}",
        f"systems=[{','.join(systems)}]",
        f"budget={budgets}",
        f"results='{results}'",
        "jobs=1",
    ]
)
print(f"{len(rows)} results of {rows['system'].nunique()} systems at {rows['budget'].nunique()} budgets")

# %% [markdown]
# ## Speed against budget
#
# Grey lines are ceilings, which no real system reaches: they know the future. Where a line is flat, more memory buys
# nothing; where it lies on the line of `lru`, the policy buys nothing.

# %%
display(Image(budget_figure(rows, results / "figures" / "budget.png").read_bytes(), width=900))

# %%
rows.pivot_table(index="system", columns="budget", values="tokens_per_s").round(1)

# %% [markdown]
# ## The smallest budget for a speed
#
# The question an engineer asks: how much memory for so many tokens per second? Between two budgets that were run the
# answer is interpolated.

# %%
import numpy as np

wanted = 60  # tokens/s
for system in systems[:4]:
    line = rows[rows["system"] == system].sort_values("budget")
    speeds, sizes = line["tokens_per_s"].to_numpy(), line["budget_bytes"].to_numpy() / 1e9
    reached = np.flatnonzero(speeds >= wanted)
    if len(reached) == 0:
        print(f"{system}: not at any budget that was run")
    elif reached[0] == 0:
        print(f"{system}: already at {sizes[0]:.1f} GB")
    else:
        print(f"{system}: from {np.interp(wanted, speeds[: reached[0] + 1], sizes[: reached[0] + 1]):.1f} GB")

# %% [markdown]
# ## What limits each system
#
# The longest part of a bar is what to work on. A bar that is mostly wait asks for a better policy or more memory; mostly
# compute or host, and no cache policy will help.

# %%
display(
    Image(
        ranking_figure(rows[rows["budget"].isin([0.125, 0.25, 0.5])], results / "figures" / "ranking.png").read_bytes(),
        width=900,
    )
)

# %% [markdown]
# ## One budget in full

# %%
display(Markdown(ranking_markdown(ranked(rows)[lambda table: table["budget"] == 0.25])))
