"""The trace: what the router chose, token by token and layer by layer.

T tokens, L MoE layers, K the largest k, E experts of a layer, D lookahead depth, M ranked predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PREFILL, DECODE = 0, 1
"""Values of `Trace.phase`."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape and sizes of a model: of the one that was recorded, or of the one whose bytes are simulated.

    `layers` counts MoE layers only. Sizes that are not known are None (or, for `expert_bytes`, absent).
    """

    name: str
    layers: int
    experts: int
    top_k: int
    shared_experts: int = 0
    hidden_size: int | None = None
    expert_width: int | None = None
    expert_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of one routed expert by precision, e.g. ``{"bf16": 12582912}``."""
    other_bytes: int | None = None
    """Bytes of everything that is not a routed expert (attention, embeddings, shared experts, norms)."""
    kv_bytes_per_token: int | None = None
    """KV-cache bytes that one token adds over all layers."""


@dataclass(frozen=True)
class Provenance:
    """Where a trace comes from."""

    kind: str
    """``recorded``, ``imported`` or ``synthetic``."""
    source: str
    """From what: the model and text recorded, the file imported, the generator's parameters."""
    made_by: str
    """By which program and version."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, JSON values only."""


@dataclass(frozen=True)
class Trace:
    """One recording. Arrays may be memory-mapped and read-only; shapes and units as in DESIGN section 4."""

    model: ModelSpec
    provenance: Provenance
    domains: tuple[str, ...]
    """Domain of each request, indexed by request id; "" where unknown."""
    experts: Array
    """[T, L, K] int8 (E <= 128) or int16. Routed ids, descending weight if `ranked`; -1 where a token used fewer."""
    request: Array
    """[T] int32. Which request."""
    position: Array
    """[T] int32. Position in the request, counted from 0."""
    step: Array
    """[T] int32. Which forward pass; tokens of one pass share it; never decreasing."""
    phase: Array
    """[T] uint8. PREFILL or DECODE."""
    weights: Array | None = None
    """[T, L, K] float16 or float32. Gate weights as the model applied them; 0 where there is no expert."""
    token_ids: Array | None = None
    """[T] int32."""
    router_logits: Array | None = None
    """[T, L, E] float16 or float32."""
    lookahead_experts: Array | None = None
    """[T, L, D, M] as `experts`. Entry d - 1 ranks by the gate of layer l + d on layer l's gate input."""
    lookahead_scores: Array | None = None
    """[T, L, D, M] float16. Their probabilities over all E experts; 0 where there is no expert."""
    expert_output_norm: Array | None = None
    """[T, L, K] float16 or float32. L2 norm of each routed expert's unweighted output."""
    residual_cosine: Array | None = None
    """[T, L] float16 or float32. Cosine of the residual stream before and after the routed experts' sum."""
    ranked: bool = True
    """Whether a token's experts are in descending weight; False where the source does not promise it."""
    hash: str = ""
    """sha256 over arrays and metadata; "" for a trace that was never written or read."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.experts)

    @property
    def steps(self) -> int:
        """Number of forward passes."""
        return len(np.unique(self.step))

    @property
    def is_synthetic(self) -> bool:
        """Whether tables and plots must say that this routing was generated."""
        return self.provenance.kind == "synthetic"

    def capabilities(self) -> frozenset[str]:
        """Return what policies may need of this trace: ``weights``, ``lookahead``, ``logits`` (`policies.contract`)."""
        found = {"weights": self.weights, "lookahead": self.lookahead_experts, "logits": self.router_logits}
        return frozenset(name for name, array in found.items() if array is not None)
