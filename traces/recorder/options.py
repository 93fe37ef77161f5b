"""What can be chosen about a recording, with the checks that need no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from traces.errors import InputError, nearest


@dataclass(frozen=True)
class RecordOptions:
    """How a model is loaded, what it generates and what is recorded of it.

    Raises `InputError`, which names the option and what it may be, for a value that no recording can have.
    """

    batch_size: int = 1
    """Prompts that run in lockstep; the tokens of one forward pass share a step of the trace."""
    new_tokens: int = 128
    """The most decode passes of a request."""
    stop_at_end: bool = True
    """Whether a request ends with the model's end-of-sequence token, which is not fed and so not recorded."""
    max_prompt_tokens: int | None = None
    """Longer prompts are cut to their first so many tokens; None cuts none."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    sample_top_k: int = 0
    """Sample among the so many likeliest tokens; 0 among all."""
    sample_top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability."""
    seed: int = 0
    """Of sampling; every batch draws from a generator of its own."""

    router_logits: str | None = None
    """``float16`` or ``float32`` records what the router scores every expert with; None does not."""
    lookahead: int = 0
    """Depth: routers of the next so many layers are asked about each layer's gate input."""
    lookahead_ranks: int | None = None
    """Experts that each such observation ranks; None is twice the model's k."""
    expert_output_norm: bool = False
    """Record the L2 norm of each routed expert's output; runs every expert twice."""
    residual_cosine: bool = False
    """Record how far the experts' sum turns the residual stream."""

    device: str = "auto"
    """Where a loaded model goes: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is CUDA where there is one."""
    device_map: str | None = None
    """transformers' own placement, such as ``auto`` for several devices; instead of `device`."""
    dtype: str = "auto"
    """Of a loaded model's parameters, such as ``bfloat16``; ``auto`` is the checkpoint's own."""
    experts_implementation: str | None = None
    """transformers' own choice of kernels for the experts; None is its default."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name in ("batch_size", "new_tokens"):
            self._whole(name, least=1)
        for name in ("sample_top_k", "seed", "lookahead"):
            self._whole(name, least=0)
        for name in ("max_prompt_tokens", "lookahead_ranks"):
            if getattr(self, name) is not None:
                self._whole(name, least=1)
        for name in ("stop_at_end", "expert_output_norm", "residual_cosine"):
            if type(getattr(self, name)) is not bool:
                self._refuse(name, "true or false")
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature < float("inf"):
            self._refuse("temperature", "a number of at least 0 (0 takes the likeliest token)")
        if type(self.sample_top_p) not in (int, float) or not 0 < self.sample_top_p <= 1:
            self._refuse("sample_top_p", "a number above 0 and at most 1")
        if self.router_logits not in (None, "float16", "float32"):
            self._refuse("router_logits", "float16 or float32, or null for none")
        for name in ("device", "dtype"):
            if type(getattr(self, name)) is not str:
                self._refuse(name, "a text")
        for name in ("device_map", "experts_implementation"):
            if getattr(self, name) is not None and type(getattr(self, name)) is not str:
                self._refuse(name, "a text or null")

    @classmethod
    def of(cls, options: dict[str, Any]) -> RecordOptions:
        """Return the options of a plain mapping; raise `InputError` for a name that is not an option."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"'{name}' is not an option of recording; {nearest(name, known)}")
        return cls(**options)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < least:
            self._refuse(name, f"a whole number of at least {least}")

    def _refuse(self, name: str, right: str) -> None:
        raise InputError(f"{name} is {getattr(self, name)!r}; it must be {right}")
