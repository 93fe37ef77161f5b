"""Both engines give the integers of a second, plainly written model on thousands of random small cases."""

import numpy as np
import pytest
from builders import make_trace
from plain_model import PlainModel

from policies.system import Composition, build_system, find_part
from sim.conformance import difference
from sim.costs import Costs
from sim.events import future_of
from sim.fast import run_fast
from sim.reference import run_reference
from sim.workload import make_workload
from traces import InputError

CASES = 1500
PREDICTORS = {
    "none": "policies.predictor.none.NoPrediction",
    "oracle": "policies.predictor.oracle.Oracle",
    "gate": "policies.predictor.cross_layer_gate.CrossLayerGate",
}
EVICTIONS = {"lru": "policies.eviction.lru.LRU", "fifo": "policies.eviction.fifo.FIFO"}
ALLOCATIONS = {"global": "policies.allocation.whole_device.WholeDevice", "uniform": "policies.allocation.uniform.Uniform"}


@pytest.mark.parametrize("part", range(4))
def test_engines_and_plain_model_agree(part):
    compared = 0
    for seed in range(part * CASES // 4, (part + 1) * CASES // 4):
        case = Case(seed)
        if case.workload is None:
            continue
        log = [] if seed % 2 else None  # keeping a log changes nothing
        run = run_reference(case.system, case.workload, case.costs, log)
        fast_log = [] if seed % 2 else None
        fast = run_fast(case.fresh_system(), case.workload, case.costs, fast_log, interpret=seed % 5 == 0)
        assert not difference(run, log or [], fast, fast_log or []), seed
        plain = PlainModel(
            case.unions(), case.predictions(), case.system.setting, case.costs, case.eviction, case.drop, case.reupload
        )
        steps, end = plain.run()
        assert np.array(run.steps).T.tolist() == steps, seed
        assert (run.end_ns, run.link_busy_ns, run.bytes_by_kind) == (end, plain.busy, plain.bytes), seed
        assert (run.prefetches, run.cancelled, run.peak_slots) == (plain.started, plain.cancelled, plain.peak), seed
        assert [run.predicted, run.predicted_and_needed, run.needed_after_prediction] == plain.predictions, seed
        compared += 1
    assert compared > CASES // 5


class Case:
    """A random small trace, workload, system and set of costs; `workload` is None where there is nothing to run."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.layers, self.experts = int(rng.integers(1, 5)), int(rng.integers(2, 8))
        self.top_k = int(rng.integers(1, min(self.experts, 4) + 1))
        self.ids, self.lookahead, trace = self.make_trace()
        order = str(rng.choice(["one_request", "continuous", "recorded"]))
        try:
            phases = str(rng.choice(["all", "all", "decode"]))
            self.workload = make_workload(trace, order, int(rng.integers(1, 4)), phases)
        except InputError:  # a trace of prompts only, and decode asked for
            self.workload = None
            return
        self.predictor, self.eviction = str(rng.choice(list(PREDICTORS))), str(rng.choice(list(EVICTIONS)))
        self.drop, self.reupload = bool(rng.random() < 0.4), bool(rng.random() < 0.3)
        self.depth = int(rng.integers(1, 4 if rng.random() < 0.8 else 2 * self.layers + 2))
        self.n = [None, 1, 2, 5][int(rng.integers(4))]
        self.costs = self.make_costs()
        self.allocation = str(rng.choice(list(ALLOCATIONS)))
        least = self.top_k * (self.layers if self.allocation == "uniform" else 1)
        most = self.layers * self.experts
        self.slots = least if rng.random() < 0.25 else int(rng.integers(least, most + 1))
        self.system = self.fresh_system()

    def make_trace(self):
        rng, rows, requests, prompts, steps = self.rng, [], [], [], []
        step = 0
        for request in range(int(rng.integers(1, 5))):
            prompt, answer = int(rng.integers(0, 6)), int(rng.integers(0, 6))
            prompts.append(prompt)
            for token in range(max(prompt + answer, 1)):
                rows.append([rng.permutation(self.experts)[: self.top_k] for _ in range(self.layers)])
                requests.append(request)
                step += token == 0 or token >= prompt
                steps.append(step - 1)
        ids = np.array(rows)
        if rng.random() < 0.3:  # some tokens use fewer experts, or none
            kept = rng.random(ids.shape) > rng.choice([0.1, 0.5])
            order = np.argsort(~kept, axis=-1, kind="stable")
            ids = np.where(np.take_along_axis(kept, order, -1), np.take_along_axis(ids, order, -1), -1)
        depth, width = int(rng.integers(1, 4)), int(rng.integers(1, self.experts + 1))
        lookahead = np.full((len(ids), self.layers, depth, width), -1)
        for token, layer, ahead in np.ndindex(lookahead.shape[:3]):
            if layer + ahead + 1 < self.layers:
                ranked = rng.permutation(self.experts).tolist()
                right = [expert for expert in ids[token, layer + ahead + 1].tolist() if expert >= 0]
                if rng.random() < 0.5:
                    ranked = right + [expert for expert in ranked if expert not in right]
                lookahead[token, layer, ahead] = ranked[:width]
        made = {"requests": requests, "steps": steps, "prompts": prompts}
        return ids, lookahead, make_trace(ids, lookahead=lookahead, expert_count=self.experts, **made)

    def make_costs(self):
        rng, steps = self.rng, len(self.workload.decode)
        chunks = int(rng.integers(1, 5))
        chunk = 0 if rng.random() < 0.08 else int(rng.integers(100, 8000))
        most = int(np.diff(self.workload.offsets).max())
        costs = Costs(
            host_gate_ns=int(rng.integers(0, 300)),
            host_experts_ns=int(rng.integers(0, 900)),
            host_step_ns=int(rng.integers(0, 3000)),
            readout_ns=int(rng.integers(0, 400)),
            step_ns=rng.integers(0, 500, steps),
            attention_ns=rng.integers(50, 3000, steps),
            expert_ns=np.concatenate([[0], rng.integers(10, 2500, most)]),
            chunks=chunks,
            chunk_ns=chunk,
            last_chunk_ns=int(rng.integers(0, chunk + 1)) if chunks > 1 else chunk,
            expert_bytes=chunks * 100 - 30,
            chunk_bytes=100,
            link_start_ns=0 if rng.random() < 0.4 or chunk == 0 else int(rng.integers(0, 2 * chunk + 100)),
            step_readout_ns=-1 if rng.random() < 0.6 else int(rng.integers(0, 2000)),
            group_ns=0 if rng.random() < 0.4 else int(rng.integers(0, 900)),
            demand_ns=() if rng.random() < 0.4 or chunk == 0 else (0, *np.cumsum(rng.integers(100, 8000, chunks)).tolist()),
            committed_chunks=int(rng.integers(0, 3)),
            beside_ns=0 if rng.random() < 0.4 else int(rng.integers(0, 900)),
        )
        if rng.random() < 0.3:  # round numbers, so that much happens at the same instant
            timed = {name: value for name, value in costs._asdict().items() if name.endswith("_ns")}
            whole = tuple(-(-value // 1000) for value in timed.pop("demand_ns"))
            rounded = {"demand_ns": whole, **{name: -(-value // 1000) for name, value in timed.items()}}
            if costs.step_readout_ns < 0:
                rounded["step_readout_ns"] = costs.step_readout_ns
            costs = costs._replace(**rounded)
        return costs

    def fresh_system(self):
        specs = {
            "predictor": {"_target_": PREDICTORS[self.predictor]},
            "prefetch": {"_target_": "policies.prefetch.top_n.TopN", "n": self.n, "depth": self.depth},
            "eviction": {"_target_": EVICTIONS[self.eviction]},
            "allocation": {"_target_": ALLOCATIONS[self.allocation]},
            "miss": {"_target_": "policies.miss.wait.Wait"},
        }
        parts = {axis: find_part(axis, spec) for axis, spec in specs.items()}
        return build_system(
            Composition("tried", parts, self.drop, self.reupload),
            slots=self.slots,
            layers=self.layers,
            experts=self.experts,
            top_k=self.top_k,
            future=lambda: future_of(self.workload.events),
        )

    def rows_of_steps(self):
        return np.split(self.workload.rows, self.workload.offsets[1:-1])

    def unions(self):
        """Return the tokens that use each key, by event, in order of first appearance."""
        found = []
        for rows in self.rows_of_steps():
            for layer in range(self.layers):
                union = {}
                for expert in self.ids[rows, layer].ravel().tolist():
                    if expert >= 0:
                        key = layer * self.experts + expert
                        union[key] = union.get(key, 0) + 1
                found.append(union)
        return found

    def predictions(self):
        """Return what is taken of the predictions of every event: (ahead, keys)."""
        unions, found = self.unions(), []
        for rows in self.rows_of_steps():
            for layer in range(self.layers):
                event = len(found)
                taken = []
                for ahead in range(1, min(self.depth, len(unions) - 1 - event) + 1):
                    keys = list(unions[event + ahead]) if self.predictor == "oracle" else self.gate(rows, layer, ahead)
                    if keys:
                        taken.append((ahead, keys[: len(rows) * (self.top_k if self.n is None else self.n)]))
                found.append(taken)
        return found

    def gate(self, rows, layer, ahead):
        if self.predictor != "gate" or layer + ahead >= self.layers or ahead > self.lookahead.shape[2]:
            return []
        ranked = self.lookahead[rows, layer, ahead - 1]
        first_key = (layer + ahead) * self.experts
        if len(rows) == 1:
            return [first_key + expert for expert in ranked[0].tolist()]
        scores = np.linspace(0.5, 0.1, ranked.shape[1]).astype(np.float16)
        votes = {}
        for token in ranked[:, : self.top_k].tolist():
            for place, expert in enumerate(token):
                votes[expert] = votes.get(expert, 0.0) + float(scores[place])
        return [first_key + expert for expert in sorted(votes, key=lambda expert: -votes[expert])]
