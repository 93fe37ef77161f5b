"""A transformers model whose experts lie in host memory and were never anywhere else; all its other weights are on a device.

Loading is transformers' own, conversions of published checkpoints included: whatever it is about to put into an experts
module goes into the slab instead, layer by layer. The one hook into the model is the experts interface.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.moe import ExpertsInterface

from real.live.expert_layout import ExpertLayout, layout_of
from real.slab import HostSlab
from traces.errors import InputError
from traces.recorder.layers import MoELayer, expert_count, moe_layers
from traces.recorder.loading import check_folder
from traces.recorder.probe import Findings, probe

KERNEL = "foregate"
"""Name of this executor's kernel in transformers' experts interface."""

Server = Callable[[int, Any, Any, Any], Any]
"""Computes the experts of layer l of (hidden [T, H], ids [T, k], weights [T, k]): [T, H]."""


def _experts_forward(module: Any, hidden: Any, ids: Any, weights: Any) -> Any:
    """Let whoever serves the module's model compute its experts."""
    server = getattr(module, "foregate_server", None)
    if server is None:
        raise InputError("the experts are in host memory and no run serves them: generate with real.live.run")
    return server(module.foregate_layer, hidden, ids, weights)


ExpertsInterface.register(KERNEL, _experts_forward)


class LiveModel:
    """A model with its experts in a slab; made by `load_model` or `random_model`."""

    def __init__(
        self, name: str, model: Any, layers: list[MoELayer], layout: ExpertLayout, slab: HostSlab, where: str
    ) -> None:
        self.name, self.model, self.layers, self.layout, self.slab, self.where = name, model, layers, layout, slab, where
        self.experts = expert_count(layers[0].experts)
        self.tensors = layout.views(torch.from_numpy(slab.blocks))
        """[keys, *shape] every expert tensor in host memory, by name."""
        self._findings: dict[bool, Findings] = {}
        for index, layer in enumerate(layers):
            layer.experts.foregate_layer = index

    @property
    def top_k(self) -> int:
        """The largest k of all layers."""
        return self.probe(routers=False).top_k

    def probe(self, *, routers: bool) -> Findings:
        """Return what one pass over a few tokens shows: k, and with `routers` who they are. Raises InputError.

        Routing does not depend on what the experts give, but for the values; so they give zeros.
        """
        if routers not in self._findings:
            vocabulary = self.model.get_input_embeddings().num_embeddings
            tokens = [(7919 * place + 3) % vocabulary for place in range(16)]
            with self.serving(lambda layer, hidden, ids, weights: torch.zeros_like(hidden)):
                self._findings[routers] = probe(
                    self.model, self.name, self.layers, tokens, routers=routers, lookahead=routers
                )
        return self._findings[routers]

    @contextmanager
    def serving(self, server: Server) -> Iterator[None]:
        """Let `server` compute the experts of all layers inside the ``with`` block."""
        before = self.model.config._experts_implementation
        self.model.set_experts_implementation(KERNEL)
        for layer in self.layers:
            layer.experts.foregate_server = server
        try:
            yield
        finally:
            for layer in self.layers:
                layer.experts.foregate_server = None
            self.model.set_experts_implementation(before)

    def fused(self, layer: int, where: str) -> dict[str, Any]:
        """Return a copy of one layer's fused experts on `where`, by name: what the module would hold."""
        rows = range(layer * self.experts, (layer + 1) * self.experts)
        found = {}
        for name, tensor in self.tensors.items():
            found[name] = torch.empty((self.experts, *tensor.shape[1:]), dtype=tensor.dtype, device=where)
            for place, row in enumerate(rows):  # one by one, since only whole experts are contiguous in the slab
                found[name][place].copy_(tensor[row], non_blocking=True)
        return found

    def close(self) -> None:
        """Release host memory and weights; may be called twice."""
        self.tensors = {}
        self.slab.close()
        self.model = None
        self.layers = []


def load_model(path: str, where: str, dtype: str = "auto") -> LiveModel:
    """Load the causal language model at `path`, a folder or the id of a published model.

    Host memory holds the experts once, and what transformers reads of one layer at a time. Raises InputError where there is
    no such model, its experts do not go through the interface or are not of one size, or memory does not suffice.
    """
    check_folder(path)
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind != "auto" and not isinstance(kind, torch.dtype):
        raise InputError(f"dtype is '{dtype}'; it must be auto or a type of torch's, such as bfloat16")
    try:
        skeleton = _skeleton(transformers.AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model: {path} cannot be loaded: {error}") from error
    layers = moe_layers(skeleton, path)
    layout_of(layers, path)
    taker = _Taker(path, len(layers), expert_count(layers[0].experts), where)
    try:
        with taker.taking({type(layer.experts) for layer in layers}), _quiet_loading():
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind, experts_implementation=KERNEL)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise InputError(f"model: {path} cannot be loaded: {error}") from error
        layers = moe_layers(model, path)
        layout, slab = taker.finish(layers)
        _let_go(layers)
        return LiveModel(Path(path).name, model.to(where).eval(), layers, layout, slab, where)
    except BaseException:
        taker.close()
        raise


def random_model(
    config: Any, where: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, name: str = ""
) -> LiveModel:
    """Build a model of `config` with random weights, its experts in host memory alone. Raises InputError."""
    name = name or str(config.model_type)
    model = _skeleton(config, dtype)
    layers = moe_layers(model, name)
    layout = layout_of(layers, name, dtype)
    slab = _slab(len(layers) * expert_count(layers[0].experts), layout.expert_bytes, where)
    try:
        slab.fill(seed)
        _let_go(layers)
        torch.manual_seed(seed)
        model.to_empty(device=where)
        with torch.no_grad():
            model.init_weights()  # also what is computed, such as rotary frequencies, which is garbage after `to_empty`
        model.set_experts_implementation(KERNEL)
        return LiveModel(name, model.eval(), layers, layout, slab, where)
    except BaseException:
        slab.close()
        raise


class _Taker:
    """Puts what is set on experts modules into a slab, which is made when the first tensor shows its type."""

    def __init__(self, name: str, layers: int, experts: int, where: str) -> None:
        self.name, self.count, self.experts, self.where = name, layers, experts, where
        self.modules: list[Any] = []
        self.slab: HostSlab | None = None
        self.layout: ExpertLayout | None = None
        self._views: dict[str, Any] = {}
        self._taken: set[tuple[int, str]] = set()

    @contextmanager
    def taking(self, classes: set[type]) -> Iterator[None]:
        """Take the parameters of all modules of `classes` that are built inside the ``with`` block."""

        def patched(cls: Any) -> tuple[Any, Any]:
            build, put = cls.__init__, cls.__setattr__

            def init(module: Any, *args: Any, **kwargs: Any) -> None:
                build(module, *args, **kwargs)
                for parameter in module.parameters():
                    parameter._is_hf_initialized = True  # transformers must not draw what is never there
                self.modules.append(module)

            def set_attribute(module: Any, name: str, value: Any) -> None:
                if not isinstance(value, torch.nn.Parameter) or value.device.type == "meta":
                    put(module, name, value)
                elif getattr(value, "_is_hf_initialized", False):  # else it stands for what the checkpoint lacks
                    self._take(module, name, value.detach())

            return init, set_attribute

        before = {cls: (cls.__dict__.get("__init__"), cls.__dict__.get("__setattr__")) for cls in classes}
        for cls in classes:
            cls.__init__, cls.__setattr__ = patched(cls)  # type: ignore[misc,method-assign]
        try:
            yield
        finally:
            for cls, (init, set_attribute) in before.items():
                cls.__init__ = init  # type: ignore[misc]
                if set_attribute is None:
                    del cls.__setattr__
                else:
                    cls.__setattr__ = set_attribute  # type: ignore[method-assign]

    def finish(self, layers: list[MoELayer]) -> tuple[ExpertLayout, HostSlab]:
        """Return layout and slab, once everything was taken. Raises InputError where the checkpoint lacks an expert."""
        if [layer.experts for layer in layers] != self.modules:
            raise InputError(f"{self.name}: the model builds its layers in another order than it holds them")
        for index, layer in enumerate(layers):
            for name, _ in layer.experts.named_parameters():
                if (index, name) not in self._taken:
                    raise InputError(f"{self.name}: the checkpoint has no {layer.name}.{name}")
        assert self.layout is not None
        assert self.slab is not None
        return self.layout, self.slab

    def close(self) -> None:
        """Release the memory."""
        self._views = {}
        self.modules = []
        if self.slab is not None:
            self.slab.close()

    def _take(self, module: Any, name: str, value: Any) -> None:
        if self.slab is None:
            layer = MoELayer("experts", module, module, module)
            self.layout = layout_of([layer], self.name, value.dtype)
            self.slab = _slab(self.count * self.experts, self.layout.expert_bytes, self.where)
            self._views = self.layout.views(torch.from_numpy(self.slab.blocks))
        assert self.layout is not None
        if value.dtype != self.layout.dtype:
            raise InputError(
                f"{self.name}: experts are of type {self.layout.dtype}, but {name} of {value.dtype}; slots hold one"
            )
        index = self.modules.index(module)
        self._views[name][index * self.experts : (index + 1) * self.experts].copy_(value)
        self._taken.add((index, name))


def _skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Build the model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def _let_go(layers: Sequence[MoELayer]) -> None:
    """Take the parameters out of the experts modules: moving the model then moves everything else."""
    for layer in layers:
        for name in list(layer.experts._parameters):
            layer.experts._parameters[name] = None
        layer.experts._is_hf_initialized = True


def _slab(experts: int, expert_bytes: int, where: str) -> HostSlab:
    if where == "cpu":
        return HostSlab(experts, expert_bytes)
    from real import cuda

    return HostSlab(experts, expert_bytes, cuda.register, cuda.unregister)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Let transformers read tensor by tensor, when it needs them, and draw no bars into a file."""
    bars, variable = transformers.utils.logging, "HF_DEACTIVATE_ASYNC_LOAD"
    shown, before = bars.is_progress_bar_enabled(), os.environ.get(variable)
    os.environ[variable] = "1"
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
