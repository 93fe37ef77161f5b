"""Make the bundled recording from the full one: ``python -m traces.reference.bundle PATH_TO_NPZ``.

The full recording (37 MB, `../shared/reference_trace`) is of a small MoE that this project trained. The
bundled part keeps two requests of each domain, their prefill and the first decode tokens, and the best 16
of 24 lookahead predictions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import present_arrays
from traces.errors import InputError
from traces.files import save_trace
from traces.importers import import_trace
from traces.slices import slice_requests
from traces.trace import ModelSpec, Provenance, Trace

TARGET = Path(__file__).parents[1] / "data" / "reference_16x64_top8.safetensors"
SIZE_LIMIT = 12_000_000
"""Bytes that the bundled file may have: it is downloaded with every installation."""

REQUESTS_PER_DOMAIN = 2
TOKENS_PER_REQUEST = 160
"""64 of prefill and 96 of decode."""
PREDICTIONS = 16
"""Lookahead predictions kept, twice top-k."""

HIDDEN, WIDTH, LAYERS, EXPERTS, VOCABULARY = 512, 256, 16, 64, 16_384
BF16 = 2
"""Bytes of one parameter."""


def model_spec() -> ModelSpec:
    """Return the recorded model's shape and sizes, from its configuration (428.4 M parameters in all)."""
    expert = 3 * HIDDEN * WIDTH
    attention = 4 * HIDDEN * HIDDEN
    norms = 4 * HIDDEN  # before attention and experts, and of queries and keys
    gate = EXPERTS * HIDDEN
    # The embedding counts once, because the output head is tied to it; then the last norm.
    other = VOCABULARY * HIDDEN + LAYERS * (attention + norms + gate) + HIDDEN
    return ModelSpec(
        name="foregate reference MoE (OLMoE architecture)",
        layers=LAYERS,
        experts=EXPERTS,
        top_k=8,
        hidden_size=HIDDEN,
        expert_width=WIDTH,
        expert_bytes={"bf16": expert * BF16},
        other_bytes=other * BF16,
        kv_bytes_per_token=LAYERS * 2 * HIDDEN * BF16,  # as many key and value heads as query heads
    )


def make_bundle(recording: Path) -> Trace:
    """Return the part of the full recording at `recording` that is bundled.

    Raises `InputError` when the file is not that recording.
    """
    whole = import_trace(recording, "plain_arrays")
    if whole.model.layers != LAYERS or whole.lookahead_experts is None or whole.lookahead_scores is None:
        raise InputError(f"{recording}: this is not the reference recording, 16 layers with lookahead")
    part = slice_requests(whole, _chosen_requests(whole.domains))
    rows = np.flatnonzero(part.position < TOKENS_PER_REQUEST)
    arrays: dict[str, Any] = {name: array[rows] for name, array in present_arrays(part).items()}
    arrays["step"] = np.unique(arrays["step"], return_inverse=True)[1].astype(np.int32)
    for name in ("lookahead_experts", "lookahead_scores"):
        arrays[name] = arrays[name][..., :PREDICTIONS]
    source_hash = str(whole.provenance.details["file_sha256"])
    return Trace(model_spec(), _provenance(recording.name, source_hash), part.domains, **arrays)


def _chosen_requests(domains: tuple[str, ...]) -> list[int]:
    """Return the first requests of each domain."""
    earlier = [domains[:request].count(domain) for request, domain in enumerate(domains)]
    return [request for request, count in enumerate(earlier) if count < REQUESTS_PER_DOMAIN]


def _provenance(file: str, file_hash: str) -> Provenance:
    return Provenance(
        kind="recorded",
        source="a MoE that this project trained on the text of Debian packages, writing on held-out text",
        made_by="foregate traces.reference.bundle 1",
        details={
            "file": file,
            "file_sha256": file_hash,
            "part": {
                "requests": "the first 2 of 4 in each of 7 domains",
                "tokens": "the first 160 of 320 in each request: 64 of prompt, 96 sampled",
                "predictions": "the best 16 of 24",
            },
            "prompt": "64 tokens of held-out text",
            "temperature": 0.8,
            "precision": "bf16, with KV cache",
            "date": "2026-11-22",
            "torch": "2.11.0+cu130",
            "transformers": "5.17.0",
            "device": "H100 80GB",
            "training": {
                "seed": 1,
                "tokens": 104_800_000,
                "load_balancing_loss": "0.01, per layer",
                "z_loss": 0.001,
                "sequence": 1024,
                "batch": 32,
                "optimizer": "AdamW (0.9, 0.95), weight decay 0.1, peak rate 1.5e-3, cosine",
            },
            "held_out_loss_nats_per_token": {
                "prose_en": 3.36,
                "dictionary_en": 2.09,
                "docs_multilingual": 2.21,
                "docs_kernel": 2.48,
                "docs_tech": 2.08,
                "code_c": 1.51,
                "code_python": 1.85,
            },
            "steps": "as if requests ran one after another; they were decoded as one batch",
        },
    )


def main() -> None:
    """Write the bundled file; the command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path, help="reference_moe_16x64_top8.npz")
    trace = make_bundle(parser.parse_args().recording)
    save_trace(trace, TARGET)
    size = TARGET.stat().st_size
    if size > SIZE_LIMIT:
        TARGET.unlink()
        raise InputError(f"{TARGET}: {size:,} bytes; the bundled file may have {SIZE_LIMIT:,}")


if __name__ == "__main__":
    main()
