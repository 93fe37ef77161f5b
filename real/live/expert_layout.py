"""How the tensors of one expert lie in a slot, for any model whose experts go through transformers' experts interface.

An experts module holds fused parameters with one row per expert; which ones, and how they are to be used, it says itself by
the flags that the interface sets on it. No architecture is known by name here.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

from real.slab import slot_bytes_of
from traces.errors import InputError
from traces.recorder.layers import MoELayer

ALIGNMENT = 16
"""Bytes; matrix products want their operands aligned."""


class ExpertLayout(NamedTuple):
    """Where each tensor of an expert is, in elements from the start of its slot."""

    names: tuple[str, ...]
    """Parameters of the experts module, in the order in which they lie."""
    shapes: tuple[tuple[int, ...], ...]
    """Of one expert."""
    offsets: tuple[int, ...]
    dtype: torch.dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return int((self.offsets[-1] + prod(self.shapes[-1])) * self.dtype.itemsize)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: whole pages."""
        return slot_bytes_of(self.expert_bytes)

    def views(self, memory: Any) -> dict[str, Any]:
        """Return every tensor of all experts in `memory` [n, slot_bytes] uint8, as [n, *shape] by name."""
        elements = memory.view(self.dtype)
        stride = self.slot_bytes // self.dtype.itemsize
        found = {}
        for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True):
            inner = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            found[name] = elements.as_strided((len(memory), *shape), (stride, *inner), offset)
        return found


def parameter_names(experts: Any) -> tuple[str, ...]:
    """Return the names of the fused parameters of an experts module, as its flags say."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    matrices = (first, "down_proj")
    return matrices if not experts.has_bias else (first, f"{first}_bias", "down_proj", "down_proj_bias")


def layout_of(layers: list[MoELayer], name: str, dtype: torch.dtype | None = None) -> ExpertLayout:
    """Return the layout that the experts of all `layers` share, in `dtype` or their own.

    `name` is what errors call the model. Raises InputError where layers differ, or hold other parameters than those that the
    interface names.
    """
    layouts = [_layout(layer, name, dtype) for layer in layers]
    for layer, found in zip(layers, layouts, strict=True):
        if found != layouts[0]:
            raise InputError(
                f"{name}: the experts of {layer.name} have other shapes than those of {layers[0].name}; slots hold experts "
                "of one size"
            )
    return layouts[0]


def _layout(layer: MoELayer, name: str, dtype: torch.dtype | None) -> ExpertLayout:
    experts: Any = layer.experts
    held = dict(experts.named_parameters())
    names = parameter_names(experts)
    if set(held) != set(names):
        odd = sorted(set(held) ^ set(names))[0]
        raise InputError(
            f"{name}: {layer.name} holds {', '.join(sorted(held))}, where the experts interface names {', '.join(names)}; "
            f"'{odd}' cannot be offloaded"
        )
    shapes = tuple(tuple(held[part].shape[1:]) for part in names)
    dtype = held[names[0]].dtype if dtype is None else dtype
    offsets, place = [], 0
    for shape in shapes:
        offsets.append(place)
        unit = ALIGNMENT // dtype.itemsize
        place += -(-prod(shape) // unit) * unit
    return ExpertLayout(names, shapes, tuple(offsets), dtype)
