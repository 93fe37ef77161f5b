"""A batch of prompts run in lockstep: one prefill pass, then one decode pass per new token.

Our own loop around the model's forward, so that it is certain which token went through which pass; the tokens are those of
transformers' ``generate``. Shorter prompts are padded on the left. Nothing here waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from traces.errors import InputError
from traces.recorder.layers import input_device
from traces.recorder.options import RecordOptions

if TYPE_CHECKING:
    import torch


def forward_passes(
    model: Any, prompts: Sequence[Sequence[int]], options: RecordOptions, batch: int
) -> Iterator[torch.Tensor]:
    """Run the prompts of one batch: the prefill, then `options.new_tokens` decode passes.

    After every pass, yield the token ids that were fed: [B, S] with padding on the left in prefill, [B, 1] in decode.

    Requests that have ended go on to be fed, because stopping would mean waiting for the device: the caller drops their rows
    and stops iterating when all have ended. `batch` is the batch's number, from which its random numbers follow.
    """
    import torch

    device = input_device(model)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _padding_id(model), dtype=torch.long)
    mask = torch.zeros((len(prompts), width + options.new_tokens), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    padded = bool((mask == 0).any())
    ids, mask = ids.to(device), mask.to(device)
    accepted = inspect.signature(model.forward).parameters
    random = _generator(options.seed, batch, device)
    cache, start = None, 0
    for _ in range(1 + options.new_tokens):
        end = start + ids.shape[1]
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        # Without padding the mask says nothing, and looking at it would make the host wait.
        arguments["attention_mask"] = mask[:, :end] if padded else None
        if "position_ids" in accepted:
            arguments["position_ids"] = positions[:, start:end]
        if "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = 1
        # Entered anew for every pass, so that the caller's own mode is back whenever it has the turn.
        with torch.no_grad():
            output = model(**arguments)
            following = _next_tokens(output.logits[:, -1], options, random).to(device)
        cache, start = output.past_key_values, end
        yield ids
        ids = following


def end_tokens(model: Any) -> frozenset[int]:
    """Return the ids that end a request, as the model's generation configuration says."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def check_lengths(model: Any, name: str, prompts: Sequence[Sequence[int]], places: Sequence[str], new_tokens: int) -> None:
    """Raise `InputError` for a prompt that holds unknown tokens, or outgrows the model's context with what is generated."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().num_embeddings
    limit = getattr(config, "max_position_embeddings", None)
    for prompt, place in zip(prompts, places, strict=True):
        if max(prompt) >= vocabulary:
            raise InputError(f"{place}: the token {max(prompt)} is unknown to {name}; its tokens are 0 to {vocabulary - 1}")
        if limit is not None and len(prompt) + new_tokens > limit:
            room = limit - new_tokens
            cut = f"cut prompts with max_prompt_tokens={room}, or " if room > 0 else ""
            raise InputError(
                f"{place}: {len(prompt)} tokens and new_tokens={new_tokens} are more than the {limit} positions of {name};"
                f" {cut}lower new_tokens"
            )


def _padding_id(model: Any) -> int:
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def _generator(seed: int, batch: int, device: torch.device) -> torch.Generator:
    import torch

    state = np.random.SeedSequence((seed, batch)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def _next_tokens(logits: torch.Tensor, options: RecordOptions, random: torch.Generator) -> torch.Tensor:
    """Return the next token of each request, [B, 1]: the likeliest, or one that is drawn."""
    import torch

    if options.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scores = logits.to(device=random.device, dtype=torch.float32) / options.temperature
    if 0 < options.sample_top_k < scores.shape[-1]:
        least = scores.topk(options.sample_top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -float("inf"))
    if options.sample_top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        # A token is left out when those likelier than it already make up the share.
        surplus = probability.cumsum(-1) - probability >= options.sample_top_p
        scores = scores.masked_fill(torch.zeros_like(surplus).scatter(1, order, surplus), -float("inf"))
    return torch.multinomial(scores.softmax(-1), 1, generator=random)
