"""Step 4b: record what a model routes while it writes, with the project's recorder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import present_arrays
from traces.errors import InputError
from traces.files import save_trace
from traces.recorder import Prompt, RecordOptions, record
from traces.reference.models import ReferenceModel
from traces.reference.tokens import PackedTokens
from traces.slices import first_tokens, one_after_another, slice_requests
from traces.trace import Trace


@dataclass(frozen=True)
class Request:
    """A prompt of held-out text."""

    domain: str
    token_ids: tuple[int, ...]


def held_out_prompts(reference: ReferenceModel, tokens: PackedTokens) -> list[list[Request]]:
    """Return the prompts, round by round; each round has one of every domain, from a place that the seed decides.

    Raises `InputError` when a held-out segment is shorter than a prompt.
    """
    settings = reference.recording
    rng = np.random.default_rng(1000 + reference.seed)
    rounds: list[list[Request]] = [[] for _ in range(settings.rounds)]
    for domain in tokens.domains:
        segments = tokens.held_out_segments(domain)
        for number, requests in enumerate(rounds):
            # Rounds spread over the text; beyond the last segment they begin again with the first.
            segment = segments[number * max(1, len(segments) // settings.rounds) % len(segments)]
            room = len(segment) - settings.prompt_tokens
            if room < 0:
                raise InputError(
                    f"{tokens.folder}: a held-out segment of '{domain}' has {len(segment)} tokens;"
                    f" a prompt needs {settings.prompt_tokens}"
                )
            start = int(rng.integers(0, room + 1))
            chosen = segment[start : start + settings.prompt_tokens].tolist()
            requests.append(Request(domain, tuple(chosen)))
    return rounds


def record_requests(
    model: Any, reference: ReferenceModel, requests: Sequence[Request], out: Path, *, new_tokens: int, name: str = ""
) -> Trace:
    """Let `model` write `new_tokens` after each prompt, all prompts as one batch; return the recording, as it lies at `out`.

    `name` is what the recording calls the model, by default its title. This is the one place that calls the recorder.
    """
    settings = reference.recording
    options = RecordOptions(
        batch_size=len(requests),
        new_tokens=new_tokens,
        temperature=settings.temperature,
        seed=reference.seed,
        router_logits="float16",
        lookahead=settings.depth,
        lookahead_ranks=settings.predictions,
        expert_output_norm=True,
        residual_cosine=settings.residual_cosine,
    )
    prompts = [
        Prompt(f"request {number}", None, request.token_ids, request.domain) for number, request in enumerate(requests)
    ]
    name = name or reference.title
    try:
        return record(model, prompts, out, options, name=name)
    except InputError as refusal:
        # Half precision can hide what a layer adds to the residual stream, in a model that has learned little above all.
        # That is no reason to lose the model that was trained.
        if not options.residual_cosine or "residual_cosine" not in str(refusal):
            raise
        print(f"recording without residual_cosine: {refusal}", flush=True)
        return record(model, prompts, out, replace(options, residual_cosine=False), name=name)


def in_parts(recording: Trace, requests_per_part: int) -> list[Trace]:
    """Return the recording cut into parts of so many requests, requests one after another, numbers in half precision.

    Each part's provenance names the recording by its hash.
    """
    count = len(recording.domains)
    starts = range(0, count, requests_per_part)
    parts = [slice_requests(recording, range(start, min(start + requests_per_part, count))) for start in starts]
    return [in_half_precision(one_after_another(part)) for part in parts]


def in_half_precision(trace: Trace) -> Trace:
    """Return `trace` with its single-precision arrays in half precision: the model computed them in bf16."""
    halved: dict[str, Any] = {
        name: array.astype(np.float16) for name, array in present_arrays(trace).items() if array.dtype == np.float32
    }
    return replace(trace, **halved, hash="")


def record_untrained(model: Any, reference: ReferenceModel, part: Trace, scratch: Path) -> Trace:
    """Return the control: what `model`, at its initial weights, routes for the very tokens of `part`, all as prompt.

    `scratch` is where the recorder may write.
    """
    assert part.token_ids is not None
    requests = [
        Request(domain, tuple(part.token_ids[part.request == number].tolist())) for number, domain in enumerate(part.domains)
    ]
    # The recorder writes at least one token, which is left out again.
    title = f"UNTRAINED {reference.title}"
    recorded = record_requests(model, reference, requests, scratch, new_tokens=1, name=title)
    prompts = first_tokens(recorded, len(requests[0].token_ids))
    return in_parts(prompts, len(requests))[0]


def save_part(trace: Trace, path: Path) -> dict[str, Any]:
    """Write `trace` and return what a run says about the file."""
    digest = save_trace(trace, path)
    return {
        "file": path.name,
        "hash": digest,
        "requests": len(trace.domains),
        "tokens": trace.tokens,
        "recorded": trace.provenance.details.get("part_of", {}).get("hash", ""),
    }
