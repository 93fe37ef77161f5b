"""Generate with offloaded experts: ``python -m real.generate`` is ``foregate generate`` without Hydra.

What it prints is JSON: new tokens of every prompt (as text where there is a tokenizer), speed, hits and bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from policies.system import Composition
from real.commands import ended
from real.driver import check_gpu
from real.live.model import LiveModel, load_model
from real.live.run import LiveRun, check_needs
from real.systems import composition, read_system
from sim.budget import parse_budget, slots_within
from traces.errors import InputError
from traces.recorder.generation import check_lengths
from traces.recorder.loading import check_folder, load_encoder
from traces.recorder.prompts import read_prompts, tokenize

Say = Callable[[int, int, str], None]
"""Told how many requests of how many are done, and what comes."""


def generate(
    path: str,
    prompts: str,
    parts: Composition,
    budget: Any,
    *,
    new_tokens: int = 64,
    graphs: bool = False,
    where: str = "cuda",
    dtype: str = "auto",
    seed: int = 0,
    check: bool = False,
    progress: Say = lambda done, total, what: None,
) -> dict[str, Any]:
    """Generate for all prompts of a file with the model at `path`, its experts offloaded by the system of `parts`.

    `budget` is a fraction of all experts or bytes such as ``4GB``; with `graphs` decode passes are captured ones. `check`
    also runs the prompts with all experts resident and the same kernels, and raises InputError where a token differs.
    Raises InputError for whatever else is wrong, before anything is loaded where that is possible.
    """
    if type(new_tokens) is not int or new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens!r}: it must be a whole number of at least 1")
    check_gpu(where, "device=cpu")
    parse_budget(budget)
    check_folder(path)
    check_needs(parts)
    entries = read_prompts(Path(prompts))
    encode = load_encoder(path)
    tokens = tokenize(entries, encode)
    model = load_model(path, where, dtype)
    try:
        check_lengths(model.model, model.name, tokens, [entry.place for entry in entries], new_tokens)
        everything = len(model.layers) * model.experts
        slots = slots_within(budget, everything, model.layout.expert_bytes)
        settings = {"new_tokens": new_tokens, "graphs": graphs, "seed": seed}
        result = _run(model, parts, slots, tokens, settings, progress)
        if check:
            resident = composition(read_system("lru"))
            expected = _run(model, resident, everything, tokens, {**settings, "preload": True}, progress)
            for entry, mine, theirs in zip(entries, result["tokens"], expected["tokens"], strict=True):
                if mine != theirs:
                    place = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
                    raise InputError(f"{entry.place}: new token {place} is not the resident model's; this is a defect")
            result["resident_tokens_per_s"] = expected["tokens_per_s"]
    finally:
        model.close()
    return result


def device_of(name: str) -> str:
    """Return ``cuda`` or ``cpu`` for the setting `name`, where ``auto`` is CUDA if there is one. Raises InputError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise InputError(f"device is '{name}': it must be auto, cuda or cpu")
    return name


def _run(
    model: LiveModel,
    parts: Composition,
    slots: int,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    progress: Say,
) -> dict[str, Any]:
    requests = []
    longest = max(map(len, prompts))
    with LiveRun(model, parts, slots, requests=len(prompts), most_prompt_tokens=longest, **settings) as run:
        for number, prompt in enumerate(prompts):
            progress(number, len(prompts), parts.name)
            requests.append(run.request(prompt))
        counts = run.outcome()
        parts_ns = run.executor.timeline.host_parts(slice(None))
        notes = run.notes
    needed = int(counts.hits.sum() + counts.late_hits.sum() + counts.misses.sum())
    decode_s = sum(request.decode_s for request in requests)
    return {
        "model": model.name,
        "system": parts.name,
        "slots": slots,
        "experts": len(model.layers) * model.experts,
        "tokens": [request.tokens for request in requests],
        "tokens_per_s": sum(len(request.tokens) - 1 for request in requests) / decode_s if decode_s else None,
        "prefill_s": [request.prefill_s for request in requests],
        "hit_rate": int(counts.hits.sum()) / needed,
        "late_hits": int(counts.late_hits.sum()),
        "misses": int(counts.misses.sum()),
        "bytes_h2d": counts.bytes_sent,
        "host_per_layer_ns": parts_ns,
        "notes": notes,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m real.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder with a saved model, or the id of a published one")
    parser.add_argument("--prompts", required=True, help="a text file with one prompt per line, or .jsonl")
    parser.add_argument("--system", default="lru")
    parser.add_argument("--budget", default="0.25", help="of all experts, or bytes such as 4GB")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--graphs", action="store_true", help="replay captured decode passes")
    parser.add_argument("--check", action="store_true", help="compare with all experts resident")
    parser.add_argument("--where", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("overrides", nargs="*", help="parts of the system to change, such as eviction=lfu")
    chosen = parser.parse_args(arguments)
    return ended(lambda: _run_command(chosen), "nothing stays allocated")


def _run_command(chosen: argparse.Namespace) -> int:
    check_gpu(chosen.where)
    parts = composition(read_system(chosen.system, chosen.overrides))
    result = generate(
        chosen.model,
        chosen.prompts,
        parts,
        chosen.budget,
        new_tokens=chosen.new_tokens,
        graphs=chosen.graphs,
        where=chosen.where,
        dtype=chosen.dtype,
        check=chosen.check,
    )
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
