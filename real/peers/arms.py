"""The arms of a comparison: each opens on a model with its experts in host memory, generates, and leaves nothing behind.

All arms run the same non-expert weights through the same loop; they differ in where experts are and in what computes them.
An arm that needs a package raises InputError where it is not installed.
"""

from __future__ import annotations

import importlib
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from real.live import LiveRun, Request
from real.live_model import LiveModel
from real.replay import free_device_memory
from real.systems import composition, read_system
from traces.errors import InputError


class Arm(ABC):
    """One way of running a model."""

    name: str
    device_experts: int | None = None
    """Experts that fit on the device at once, where the arm has such a limit."""
    offloads = True
    """Whether it competes: experts come from host memory as they are needed."""
    share_of_tokens = 1.0
    """Of the tokens asked for; less for arms that take seconds a token."""

    @abstractmethod
    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Open the arm; what is yielded has `request(prompt)` and `facts(request)`."""


class _Loop:
    """Generates with the model's own forward, greedily; counts are whoever computes the experts'."""

    def __init__(self, model: LiveModel, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        accepted = inspect.signature(model.model.forward).parameters
        self._arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._arguments["logits_to_keep"] = 1
        self.begin_decode: Any = lambda: None

    def request(self, prompt: Sequence[int]) -> Request:
        """Generate for one prompt and wait until the device is done."""
        with torch.no_grad():
            start = time.perf_counter()
            ids = torch.tensor([list(prompt)]).to(self.model.where)
            output = self.model.model(input_ids=ids, **self._arguments)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            self._wait()
            self.begin_decode()
            middle = time.perf_counter()
            tokens = [token]
            for _ in range(1, self.new_tokens):
                output = self.model.model(input_ids=token, past_key_values=output.past_key_values, **self._arguments)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
            self._wait()
            end = time.perf_counter()
        return Request(torch.cat(tokens, 1)[0].tolist(), middle - start, end - middle)

    def facts(self, request: int) -> dict[str, Any]:
        """Return what is to be known of the decode passes of the last request."""
        return {}

    def _wait(self) -> None:
        if self.model.where != "cpu":
            torch.cuda.synchronize()


class Resident(Arm):
    """All experts on the device, computed by one of transformers' own kernels."""

    offloads = False

    def __init__(self, kernel: str) -> None:
        self.name, self.kernel = f"resident {kernel}", kernel

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Put every layer's fused experts on the device."""
        with _with_experts(model, self.kernel, lambda layer: model.fused(layer, model.where)):
            yield _Loop(model, new_tokens)


class Accelerate(Arm):
    """Accelerate's CPU offload: before a layer computes, all its experts come to the device, and go again."""

    share_of_tokens = 0.05

    def __init__(self) -> None:
        self.name = "accelerate cpu offload"

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Give every experts module its parameters in plain host memory and accelerate's hook."""
        hooks = _package("accelerate.hooks")
        accelerate = _package("accelerate")
        modules = [layer.experts for layer in model.layers]
        device = torch.device("cpu" if model.where == "cpu" else "cuda:0")
        with _with_experts(model, "grouped_mm", lambda layer: model.fused(layer, "cpu")):
            try:
                for module in modules:
                    accelerate.cpu_offload(module, execution_device=device)
                yield _Loop(model, new_tokens)
            finally:
                for module in modules:
                    hooks.remove_hook_from_module(module, recurse=True)


class PerLayerLRU(Arm):
    """What early offloading code does: an LRU for each layer, loads one by one on the compute stream, an eager loop.

    After the style of mixtral-offloading (arXiv 2312.17238, github.com/dvmazur/mixtral-offloading at ce54518): one pinned
    block and one copy an expert, ids read with ``.tolist()``; with `write_back`, who leaves is copied to the host.
    """

    share_of_tokens = 0.5

    def __init__(self, budget: float, *, write_back: bool) -> None:
        self.name = f"per-layer lru, {'write-back' if write_back else 'no write-back'}, {budget:g}"
        self.budget, self.write_back = budget, write_back

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Allocate each layer's slots."""
        cache = _Cache(model, max(int(self.budget * model.experts), 1), self.write_back, new_tokens)
        self.device_experts = cache.per_layer * len(model.layers)
        with model.serving(cache.experts):
            yield cache


class _Cache(_Loop):
    """The slots of `PerLayerLRU`."""

    def __init__(self, model: LiveModel, per_layer: int, write_back: bool, new_tokens: int) -> None:
        super().__init__(model, new_tokens)
        self.per_layer, self.write_back = per_layer, write_back
        layers, size = len(model.layers), model.layout.slot_bytes
        self.slots = torch.zeros(layers * per_layer, size, dtype=torch.uint8, device=model.where)
        self._tensors = model.layout.views(self.slots)
        self._host = torch.from_numpy(model.slab.blocks)
        self._first, self._second = (name for name in model.layout.names if not name.endswith("_bias"))
        self._resident: list[dict[int, int]] = [{} for _ in range(layers)]
        """By layer the slot of every resident expert, the least recently used first."""
        self.begin_decode = self._forget_counts
        self._forget_counts()

    def experts(self, layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        """Compute a layer's experts one after the other, each loaded when its turn comes."""
        module: Any = self.model.layers[layer].experts
        output = torch.zeros_like(hidden)
        chosen = ids.tolist()
        for expert in dict.fromkeys(expert for row in chosen for expert in row):
            if expert >= self.model.experts:
                continue
            slot = self._slot(layer, expert)
            token, place = torch.where(ids == expert)
            wide = self._linear(module, hidden[token], self._first, slot)
            narrow = module._apply_gate(wide) if module.has_gate else module.act_fn(wide)
            part = self._linear(module, narrow, self._second, slot) * weights[token, place, None]
            output.index_add_(0, token, part.to(output.dtype))
        return output

    def facts(self, request: int) -> dict[str, Any]:
        """Return hits and bytes of the decode passes of the last request."""
        moved = self.misses * self.model.layout.expert_bytes
        needed = self.hits + self.misses
        return {
            "hit_rate": self.hits / needed if needed else float("nan"),
            "bytes_h2d": moved,
            "bytes_d2h": self.written * self.model.layout.expert_bytes,
        }

    def _slot(self, layer: int, expert: int) -> int:
        resident = self._resident[layer]
        if expert in resident:
            self.hits += 1
            resident[expert] = slot = resident.pop(expert)
            return slot
        self.misses += 1
        if len(resident) < self.per_layer:
            slot = layer * self.per_layer + len(resident)
        else:
            leaving = next(iter(resident))
            slot = resident.pop(leaving)
            if self.write_back:
                self._host[layer * self.model.experts + leaving].copy_(self.slots[slot], non_blocking=True)
                self.written += 1
        self.slots[slot].copy_(self._host[layer * self.model.experts + expert], non_blocking=True)
        resident[expert] = slot
        return slot

    def _linear(self, module: Any, x: Any, name: str, slot: int) -> Any:
        matrix = self._tensors[name][slot]
        bias = self._tensors[f"{name}_bias"][slot] if module.has_bias else None
        return functional.linear(x, matrix.T if module.is_transposed else matrix, bias)

    def _forget_counts(self) -> None:
        self.hits = self.misses = self.written = 0


class PolicyLang(Arm):
    """moe-policylang 1.15.0's LRU (MIT, from PyPI), as it is shipped, or copying from memory that we registered.

    Its cache is keyed by the expert without the layer, so its hit rate is not that of an LRU of as many experts.
    """

    share_of_tokens = 0.25

    def __init__(self, budget: float, *, pinned: bool) -> None:
        self.name = f"moe-policylang, {'pinned by us' if pinned else 'as shipped'}, {budget:g}"
        self.budget, self.pinned = budget, pinned

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Attach the package's manager to the model."""
        package = _package("moe_policylang")
        capacity = max(int(self.budget * model.experts), model.top_k)
        self.device_experts = capacity * len(model.layers)
        rows = model.experts

        def source(layer: int) -> dict[str, Any]:
            if not self.pinned:
                return model.fused(layer, "cpu")
            return {name: tensor[layer * rows : (layer + 1) * rows] for name, tensor in model.tensors.items()}

        with _with_experts(model, "eager", source):
            manager = package.attach(model.model, f"policy lru {{ cache {{ capacity = {capacity}  eviction = lru }} }}")
            try:
                yield _Managed(model, new_tokens, manager)
            finally:
                manager.detach()
                for layer in model.layers:  # it puts back bound methods where there were none
                    layer.block.__dict__.pop("forward", None)
                    layer.experts.__dict__.pop("forward", None)
                    layer.experts.__dict__.pop("_moe_policylang_ctx", None)


class _Managed(_Loop):
    """Reads moe-policylang's own counts."""

    def __init__(self, model: LiveModel, new_tokens: int, manager: Any) -> None:
        super().__init__(model, new_tokens)
        self._manager = manager
        self.begin_decode = self._note
        self._before = (0, 0)

    def facts(self, request: int) -> dict[str, Any]:
        """Return hits and bytes of the decode passes of the last request."""
        loads, moved = (now - then for now, then in zip(self._counts(), self._before, strict=True))
        needed = (self.new_tokens - 1) * len(self.model.layers) * self.model.top_k
        return {"hit_rate": 1 - loads / needed if needed else float("nan"), "bytes_h2d": moved}

    def _note(self) -> None:
        self._before = self._counts()

    def _counts(self) -> tuple[int, int]:
        stats = self._manager.stats
        return stats.cpu_to_gpu_transfers, stats.bytes_transferred


class Ours(Arm):
    """This project's executor with one of its systems; with a budget of 1 all experts are brought in before."""

    def __init__(self, system: str, budget: float, *, graphs: bool) -> None:
        how = "graphs" if graphs else "eager"
        self.offloads = budget < 1
        self.name = f"foregate {system}, {how}, {budget:g}" if self.offloads else f"resident foregate, {how}"
        self.system, self.budget, self.graphs = system, budget, graphs

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Open a live run."""
        everything = len(model.layers) * model.experts
        slots = int(self.budget * everything)
        self.device_experts = slots
        with LiveRun(
            model,
            composition(read_system(self.system)),
            slots,
            requests=requests,
            new_tokens=new_tokens,
            most_prompt_tokens=most_prompt_tokens,
            graphs=self.graphs,
            preload=not self.offloads,
        ) as run:
            yield _Live(run)


class _Live:
    """A live run as an arm."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self._sent = 0

    def request(self, prompt: Sequence[int]) -> Request:
        """Generate for one prompt."""
        return self.run.request(prompt, on_decode=self._begin_decode)

    def facts(self, request: int) -> dict[str, Any]:
        """Return counts and host times of the decode passes of a request."""
        steps, counts = self.run.decode_steps(request), self.run.outcome()
        hits, late, misses = (int(count[steps].sum()) for count in (counts.hits, counts.late_hits, counts.misses))
        timeline = self.run.executor.timeline
        parts = timeline.host_parts(steps)
        issue = {"issue_gate": parts["issue_gate"]} if self.run.graphs else {"model_forward": parts["issue_gate"]}
        return {
            "hit_rate": hits / max(hits + late + misses, 1),
            "late_hits": late,
            "misses": misses,
            "bytes_h2d": counts.bytes_sent - self._sent,
            "link_bytes_per_s": self.run.link_rate,
            "host_per_layer_ns": {**issue, **{name: value for name, value in parts.items() if name != "issue_gate"}},
            "step_ns_median": float(np.median(timeline.step_ns[steps.start : steps.stop - 1])),
            "graphs": self.run.graphs,
            "notes": self.run.notes,
        }

    def _begin_decode(self) -> None:
        self._sent = self.run.outcome().bytes_sent


@contextmanager
def _with_experts(model: LiveModel, kernel: str, source: Any) -> Iterator[None]:
    """Give the experts modules the parameters ``source(layer)`` and transformers' `kernel` inside the ``with`` block."""
    before = model.model.config._experts_implementation
    try:
        for index, layer in enumerate(model.layers):
            for name, tensor in source(index).items():
                layer.experts._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
        model.model.set_experts_implementation(kernel)
        yield
    finally:
        for layer in model.layers:
            for name in model.layout.names:
                layer.experts._parameters[name] = None
        model.model.set_experts_implementation(before)
        free_device_memory()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"the package {name.partition('.')[0]} is not installed: {error}") from error


SYSTEMS = ("lru_per_layer", "lru", "lrfu", "next_gate_lrfu", "fate")


def all_arms(budgets: Sequence[float]) -> list[Arm]:
    """Return the arms: the resident model with every kernel, the peers, and ours."""
    arms: list[Arm] = [Resident("grouped_mm"), Resident("batched_mm"), Resident("eager")]
    arms += [Ours("lru", 1.0, graphs=graphs) for graphs in (False, True)]
    for budget in budgets:
        arms += [PerLayerLRU(budget, write_back=write_back) for write_back in (True, False)]
        arms += [Ours(system, budget, graphs=True) for system in SYSTEMS]
        arms += [Ours(system, budget, graphs=False) for system in ("lru_per_layer", "next_gate_lrfu")]
    arms += [PolicyLang(budgets[0], pinned=pinned) for pinned in (False, True)]
    arms.append(Accelerate())
    return arms
