# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own policy in ten minutes
#
# A policy is a few arrays and the methods that its axis asks for. This one decides which expert leaves: the one whose
# last use *but one* is oldest, which forgives a single use (LRU-2; O'Neil, O'Neil and Weikum, SIGMOD 1993).

# %%
import os
import sys
import tempfile
from pathlib import Path

from IPython.display import Image, Markdown, display

from sim.compare import compare
from sim.config import compose_config
from sim.conformance import check
from sim.experiment import composition_of
from sim.figures import ranking_figure
from sim.report import ranking_markdown

tokens = os.environ.get("FOREGATE_TOKENS", "null")  # how many of the trace's tokens to take; null is all
folder = Path(tempfile.mkdtemp())  # a folder of yours, anywhere

# %% [markdown]
# ## The policy
#
# One file. The engines call `on_insert`, `on_hit` and `on_evict` as experts come, are used and go, with the expert's key
# and the number of the event; whoever has the lowest `score` leaves first. That is the whole contract of this axis
# (`policies/contract.py`).

# %%
policy = '''
"""My first policy."""

from typing import NamedTuple

import numpy as np

from policies.contract import Ints, Setting


class LastButOne(NamedTuple):
    """Evict the expert whose last use but one is oldest."""

    last: Ints
    before: Ints

    @classmethod
    def build(cls, setting: Setting) -> "LastButOne":
        return cls(np.full(setting.keys, -1), np.full(setting.keys, -1))

    def on_insert(self, key: int, pool: int, now: int) -> None:
        self.on_hit(key, pool, now)

    def on_hit(self, key: int, pool: int, now: int) -> None:
        self.before[key] = self.last[key]
        self.last[key] = now

    def on_evict(self, key: int, pool: int, now: int) -> None:
        pass

    def score(self, key: int, now: int) -> int:
        return self.before[key]
'''
source = folder / "mine.py"
source.write_text(policy)
print(f"{source.name} has {len(policy.splitlines())} lines")

# %% [markdown]
# ## Its options
#
# Two YAML files of a line or two: the policy as an option of its axis, and a system that uses it.

# %%
options = folder / "options"
(options / "eviction").mkdir(parents=True)
(options / "system").mkdir()
(options / "eviction" / "mine.yaml").write_text("_target_: mine.LastButOne\n")
(options / "system" / "mine.yaml").write_text(
    """# @package _global_
# The expert whose last use but one is oldest leaves.
defaults:
  - override /eviction: mine
system: {name: mine}
"""
)
sys.path.insert(0, str(folder))  # the command line finds it in the folder where it is started

# %% [markdown]
# ## Does it keep the rules?
#
# `check` runs it on small generated traces in both engines and says which rule it breaks: it may not look ahead, may not
# depend on how experts are numbered, may not throw out what is needed, and must decide the same every time. Silence is
# good.

# %%
check(composition_of(compose_config("simulate", ["eviction=mine", "plugins=[mine]"], config_dir=str(options))))
print("it keeps them")

# %% [markdown]
# ## Is it any good?
#
# Against LRU, the best of the bundled caches, and the two ceilings: the fewest misses possible, and the best on this
# link.

# %%
rows, _ = compare(
    [
        f"trace.tokens={tokens}",
        "plugins=[mine]",
        "systems=[lru,lrfu,sieve,mine,belady,clairvoyant]",
        "budget=[0.25,0.5]",
        f"results='{folder / 'results'}'",
        "jobs=1",
    ],
    config_dir=str(options),
)
display(Markdown(ranking_markdown(rows)))

# %%
display(Image(ranking_figure(rows, folder / "ranking.png").read_bytes(), width=900))

# %% [markdown]
# From here: `docs/policies.md` for the other axes and the rules that are easy to miss. In the project itself a policy is
# one file under `policies/` and one YAML under `conf/`, and the test suite finds it by itself.
