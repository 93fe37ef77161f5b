"""The arms of a comparison: each opens on a model with its experts in host memory, generates, and leaves nothing behind.

All arms run the same non-expert weights on the same tokens; they differ in where experts are and in what computes them.
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

from policies.contract import Future
from real.decoder import GRAPH_TOKENS
from real.live.decoder import is_plain_silu
from real.live.model import LiveModel
from real.live.run import LiveRun, Request
from real.replay import free_device_memory
from real.systems import composition, read_system
from traces.errors import InputError


class Arm(ABC):
    """One way of running a model."""

    name: str
    kind: str
    """``resident``, where all experts are on the device; else ``peer``, ``equal`` (a peer's way on our kernel), ``ours``, or
    ``anchor``, which knows the future."""
    kernel: str
    """What computes experts: the arm's tokens are those of ``resident KERNEL``, if it is right."""
    budget: float | None = None
    """Of all experts, on the device at once; None where the arm has no such limit."""
    device_experts: int | None = None
    """Experts that fit on the device at once, where the arm has such a limit."""
    most_tokens: int | None = None
    """It decodes at most so many of the tokens, since each takes seconds."""
    slow = False
    """Whether it is run once, and not in every repeat."""

    @abstractmethod
    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Open the arm; what is yielded has `request(prompt, forced)` and `facts(request)`, as in `_Loop`."""


class _Loop:
    """Decodes given tokens with the model's own forward; counts are whoever computes the experts'."""

    def __init__(self, model: LiveModel) -> None:
        self.model, self.passes = model, 0
        accepted = inspect.signature(model.model.forward).parameters
        self._arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._arguments["logits_to_keep"] = 1
        self.begin_decode: Any = lambda: None

    def request(self, prompt: Sequence[int], forced: Sequence[int]) -> Request:
        """Run the prompt, then a pass for each of the tokens `forced`, and wait until the device is done.

        As in `LiveRun.request`, what is returned is the likeliest token of every pass.
        """
        self.passes = len(forced)
        with torch.no_grad():
            given = torch.tensor([list(forced)], dtype=torch.int64).to(self.model.where)
            start = time.perf_counter()
            ids = torch.tensor([list(prompt)]).to(self.model.where)
            output = self.model.model(input_ids=ids, **self._arguments)
            tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
            self._wait()
            self.begin_decode()
            middle = time.perf_counter()
            for place in range(self.passes):
                fed = given[:, place : place + 1]
                output = self.model.model(input_ids=fed, past_key_values=output.past_key_values, **self._arguments)
                tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
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

    kind = "resident"

    def __init__(self, kernel: str) -> None:
        self.name, self.kernel = f"resident {kernel}", kernel

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Put every layer's fused experts on the device."""
        with _with_experts(model, self.kernel, lambda layer: model.fused(layer, model.where)):
            yield _Loop(model)


class Accelerate(Arm):
    """Accelerate's CPU offload: before a layer computes, all its experts come to the device, and go again."""

    kind, kernel = "peer", "grouped_mm"
    most_tokens, slow = 3, True

    def __init__(self) -> None:
        self.name = "accelerate cpu offload"

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Give every experts module its parameters in plain host memory and accelerate's hook."""
        hooks = _package("accelerate.hooks")
        accelerate = _package("accelerate")
        modules = [layer.experts for layer in model.layers]
        device = torch.device("cpu" if model.where == "cpu" else "cuda:0")
        with _with_experts(model, self.kernel, lambda layer: model.fused(layer, "cpu")):
            try:
                for module in modules:
                    accelerate.cpu_offload(module, execution_device=device)
                yield _Loop(model)
            finally:
                for module in modules:
                    hooks.remove_hook_from_module(module, recurse=True)


class PerLayerLRU(Arm):
    """What early offloading code does: an LRU for each layer, loads one by one on the compute stream, an eager loop.

    After the style of mixtral-offloading (arXiv 2312.17238, github.com/dvmazur/mixtral-offloading at ce54518): one pinned
    block and one copy an expert, ids read with ``.tolist()``; with `write_back`, who leaves is copied to the host. With
    `our_kernel` experts are computed as ours are, so that what differs from ours is the executor alone.
    """

    budget: float

    def __init__(self, budget: float, *, write_back: bool = False, our_kernel: bool = False) -> None:
        what = "our kernel" if our_kernel else "write-back" if write_back else "no write-back"
        self.name = f"per-layer lru, {what}, {budget:g}"
        self.kind, self.kernel = ("equal", "foregate, eager") if our_kernel else ("peer", "eager")
        self.budget, self.write_back, self.our_kernel = budget, write_back, our_kernel

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Allocate each layer's slots."""
        per_layer = max(int(self.budget * model.experts), 1)
        cache = _CacheForOurKernel(model, per_layer) if self.our_kernel else _Cache(model, per_layer, self.write_back)
        self.device_experts = cache.per_layer * len(model.layers)
        with model.serving(cache.experts):
            yield cache


class _Cache(_Loop):
    """The slots of `PerLayerLRU`."""

    def __init__(self, model: LiveModel, per_layer: int, write_back: bool) -> None:
        super().__init__(model)
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
        output = torch.zeros_like(hidden)
        chosen = ids.tolist()
        for expert in dict.fromkeys(expert for row in chosen for expert in row):
            if expert >= self.model.experts:
                continue
            token, place = torch.where(ids == expert)
            part = self._expert(layer, hidden[token], self._slot(layer, expert)) * weights[token, place, None]
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

    def _expert(self, layer: int, hidden: Any, slot: int) -> Any:
        """Compute the expert in a slot with plain products and the model's own activation."""
        module: Any = self.model.layers[layer].experts
        wide = self._linear(module, hidden, self._first, slot)
        narrow = module._apply_gate(wide) if module.has_gate else module.act_fn(wide)
        return self._linear(module, narrow, self._second, slot)

    def _linear(self, module: Any, x: Any, name: str, slot: int) -> Any:
        matrix = self._tensors[name][slot]
        bias = self._tensors[f"{name}_bias"][slot] if module.has_bias else None
        return functional.linear(x, matrix.T if module.is_transposed else matrix, bias)

    def _forget_counts(self) -> None:
        self.hits = self.misses = self.written = 0


class _CacheForOurKernel(_Cache):
    """The same cache and loads, computed as `LiveDecoder` does: one kernel over slots in decode passes on a GPU.

    An event's experts are touched before those that it lacks are loaded, since the kernel needs all of them at once. Every
    output is kept and summed in fp32, heaviest expert first, in which order the router names them.
    """

    def __init__(self, model: LiveModel, per_layer: int) -> None:
        super().__init__(model, per_layer, write_back=False)
        self._kernels = self._use_kernels(model.where)
        if self._kernels:
            module: Any = model.layers[0].experts
            self._elements = self.slots.view(model.layout.dtype)
            size, width = model.layout.shapes[model.layout.names.index(self._second)]
            if not is_plain_silu(module) or model.layout.offsets[1] != 2 * width * size:
                raise InputError(f"{model.name}: the arm with our kernel computes down(silu(gate) * up) alone")
            entries, where = GRAPH_TOKENS * model.top_k, model.where
            self._activation = torch.zeros(entries, width, dtype=torch.float32, device=where)
            self._y = torch.zeros(entries, size, dtype=torch.float32, device=where)
            self._slots_on_host = torch.zeros(entries, dtype=torch.int32, pin_memory=where != "cpu")
            self._slots_on_device = torch.zeros(entries, dtype=torch.int32, device=where)
            self._turn = torch.zeros(1, dtype=torch.int32, device=where)

    @staticmethod
    def _use_kernels(where: str) -> bool:
        """Whether decode passes run on the Triton kernel: on a GPU."""
        return where != "cpu"

    def experts(self, layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        """Load and compute a layer's experts: all at once in a decode pass, one after the other in a prompt's."""
        chosen = [expert for row in ids.tolist() for expert in row]
        resident = self._resident[layer]
        union = sorted(dict.fromkeys(chosen), key=lambda expert: expert not in resident)
        if self._kernels and len(hidden) <= GRAPH_TOKENS and len(union) <= self.per_layer:
            slots = {expert: self._slot(layer, expert) for expert in union}
            return self._all_at_once([slots[expert] for expert in chosen], hidden, weights)
        y = torch.zeros(ids.numel(), hidden.shape[1], device=hidden.device)
        for expert in union:
            places = torch.where(ids.reshape(-1) == expert)[0]
            y[places] = self._expert(layer, hidden[places // ids.shape[1]], self._slot(layer, expert)).float()
        return (y.view(*ids.shape, -1) * weights.float()[..., None]).sum(1).to(hidden.dtype)

    def _all_at_once(self, slots: list[int], hidden: Any, weights: Any) -> Any:
        """Compute the experts in `slots` [n * K] for `hidden` [n, H], and sum them by `weights` [n, K]."""
        from real import kernels

        entries = len(slots)
        on_host, on_device = self._slots_on_host[:entries], self._slots_on_device[:entries]
        on_host.copy_(torch.tensor(slots, dtype=torch.int32))  # the read of ids waited for the copy of the layer before
        on_device.copy_(on_host, non_blocking=True)
        y, output = self._y[:entries], torch.empty_like(hidden)
        kernels.experts_by_slot(
            hidden.contiguous(), self._elements, on_device, self._activation[:entries], y, weights.shape[1]
        )
        kernels.combine(y, weights.float().contiguous(), output, self._turn)
        return output


class PolicyLang(Arm):
    """moe-policylang 1.15.0's LRU (MIT, from PyPI), as it is shipped, or copying from memory that we registered.

    Its cache is keyed by the expert without the layer, so its hit rate is not that of an LRU of as many experts.
    """

    kind, kernel = "peer", "eager"
    budget: float

    def __init__(self, budget: float, *, pinned: bool) -> None:
        self.name = f"moe-policylang, {'pinned by us' if pinned else 'as shipped'}, {budget:g}"
        self.budget, self.pinned = budget, pinned
        self.slow = not pinned

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

        with _with_experts(model, self.kernel, source):
            manager = package.attach(model.model, f"policy lru {{ cache {{ capacity = {capacity}  eviction = lru }} }}")
            try:
                yield _Managed(model, manager)
            finally:
                manager.detach()
                for layer in model.layers:  # it puts back bound methods where there were none
                    layer.block.__dict__.pop("forward", None)
                    layer.experts.__dict__.pop("forward", None)
                    layer.experts.__dict__.pop("_moe_policylang_ctx", None)


class _Managed(_Loop):
    """Reads moe-policylang's own counts."""

    def __init__(self, model: LiveModel, manager: Any) -> None:
        super().__init__(model)
        self._manager = manager
        self.begin_decode = self._note
        self._before = (0, 0)

    def facts(self, request: int) -> dict[str, Any]:
        """Return hits and bytes of the decode passes of the last request."""
        loads, moved = (now - then for now, then in zip(self._counts(), self._before, strict=True))
        needed = self.passes * len(self.model.layers) * self.model.top_k
        return {"hit_rate": 1 - loads / needed if needed else float("nan"), "bytes_h2d": moved}

    def _note(self) -> None:
        self._before = self._counts()

    def _counts(self) -> tuple[int, int]:
        stats = self._manager.stats
        return stats.cpu_to_gpu_transfers, stats.bytes_transferred


class Recorded:
    """What the router chose in the last run of the resident model, for arms that know the future."""

    routing: Future | None = None


class Ours(Arm):
    """This project's executor with one of its systems; with a budget of 1 all experts are brought in before.

    The resident model puts its routing into `recorded`, if given; a system that needs the future has it from there.
    """

    budget: float

    def __init__(self, system: str, budget: float, *, graphs: bool, recorded: Recorded | None = None) -> None:
        how = "graphs" if graphs else "eager"
        self._parts = composition(read_system(system))
        self._foresees = "future" in self._parts.needs
        self.kind = "resident" if budget >= 1 else "anchor" if self._foresees else "ours"
        self.kernel = f"foregate, {how}"
        self.name = "resident " + self.kernel if self.kind == "resident" else f"foregate {system}, {how}, {budget:g}"
        self.budget, self.graphs, self._recorded = budget, graphs, recorded

    @contextmanager
    def opened(self, model: LiveModel, requests: int, new_tokens: int, most_prompt_tokens: int) -> Iterator[Any]:
        """Open a live run. Raises InputError where it knows the future and nobody recorded that."""
        future = self._recorded.routing if self._recorded and self._foresees else None
        if self._foresees and future is None:
            raise InputError(f"'{self.name}' knows the future from 'resident {self.kernel}', which did not run before it")
        everything = len(model.layers) * model.experts
        slots = int(self.budget * everything)
        self.device_experts = slots
        with LiveRun(
            model,
            self._parts,
            slots,
            requests=requests,
            new_tokens=new_tokens,
            most_prompt_tokens=most_prompt_tokens,
            graphs=self.graphs,
            preload=self.kind == "resident",
            future=future,
        ) as run:
            yield _Live(run)
            if self._recorded and self.kind == "resident":
                self._recorded.routing = run.routing()


class _Live:
    """A live run as an arm."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self._sent = 0

    def request(self, prompt: Sequence[int], forced: Sequence[int]) -> Request:
        """Run the prompt, and decode the tokens `forced`."""
        return self.run.request(prompt, self._begin_decode, forced=forced)

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
            "unforeseen_events": self.run.unforeseen(),
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
        raise InputError(f"the package {name.partition('.')[0]} is not installed") from error


SYSTEMS = ("lru_per_layer", "lru", "next_gate", "next_gate_lrfu", "fate", "clairvoyant")


def all_arms(budgets: Sequence[float]) -> list[Arm]:
    """Return the arms, in the order in which they run: what is compared with one another stands together, slow arms last.

    The resident model comes first: `clairvoyant` knows its routing.
    """
    recorded = Recorded()
    arms: list[Arm] = [Ours("lru", 1.0, graphs=True, recorded=recorded), Ours("lru", 1.0, graphs=False)]
    for budget in budgets:
        arms += [PerLayerLRU(budget), PerLayerLRU(budget, our_kernel=True)]
        arms += [Ours("lru_per_layer", budget, graphs=False)]
        arms += [Ours(system, budget, graphs=True, recorded=recorded) for system in SYSTEMS]
        arms += [Ours("next_gate_lrfu", budget, graphs=False), PerLayerLRU(budget, write_back=True)]
    arms += [Resident("eager"), Resident("batched_mm"), Resident("grouped_mm")]
    arms += [PolicyLang(budgets[0], pinned=True), PolicyLang(budgets[0], pinned=False), Accelerate()]
    return arms
