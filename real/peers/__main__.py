"""Run every arm on one model, repeats interleaved: ``python -m real.peers --out DIR --minutes 6``.

First the identity checks of `real.identity`. Then, repeat by repeat, every arm decodes given random tokens, the same for
all, after a prompt that warms it up and after one that is timed. The first repeat is short and dropped. Every row is written
as soon as it is there, ``summary.json`` in the end, also when time is up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from real.commands import ended
from real.driver import STAND_IN, check_gpu, device_name
from real.host import undisturbed
from real.identity import check_all, failed, prompts_of, separated
from real.live.model import LiveModel, random_model
from real.peers.arms import Arm, all_arms
from real.peers.report import FORMAT, defects, summarise, table
from real.replay import device_errors, free_device_memory, make_folder
from traces.errors import InputError

BUDGETS = (0.25, 0.5)
DROPPED_TOKENS = 2
"""Of each request in the first repeat: enough that all is compiled, and a captured pass replayed."""
SHAPES: dict[str, dict[str, int]] = {
    "olmoe": {"intermediate_size": 1024},  # the published model's; the class's default is another
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
    },
}


def build_model(shape: str, where: str) -> LiveModel:
    """Build a model of OLMoE's architecture with random weights whose routing varies: embeddings of standard deviation 1."""
    config = transformers.OlmoeConfig(**SHAPES[shape])
    dtype = torch.bfloat16 if where != "cpu" else torch.float32
    model = random_model(config, where, dtype=dtype, name=f"{shape} shape, random weights")
    with torch.no_grad():
        model.model.get_input_embeddings().weight.normal_(0.0, 1.0)
    return model


class Task(NamedTuple):
    """What every arm does once: run a prompt, then decode given tokens."""

    prompt: list[int]
    forced: list[int]


def tasks_of(vocabulary: int, prompt_tokens: int, warm_up_tokens: int, tokens: int) -> list[Task]:
    """Return one task that warms an arm up and the one that is timed, of random tokens, the same in every call."""
    lengths = (prompt_tokens, prompt_tokens, warm_up_tokens, tokens)
    first, second, *forced = prompts_of(vocabulary, lengths, seed=1)
    return [Task(first, forced[0]), Task(second, forced[1])]


def run_arm(arm: Arm, model: LiveModel, tasks: Sequence[Task]) -> dict[str, Any]:
    """Open an arm, warm it up with all tasks but the last, time that, and return the row. Raises InputError."""
    tasks = [Task(prompt, forced[: arm.most_tokens]) for prompt, forced in tasks]
    on_gpu = model.where != "cpu"
    free_device_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    most_passes = 1 + max(len(task.forced) for task in tasks)
    most_prompt = max(len(task.prompt) for task in tasks)
    with device_errors(arm.name), arm.opened(model, len(tasks), most_passes, most_prompt) as opened:
        with undisturbed():
            for task in tasks[:-1]:
                opened.request(*task)
            request = opened.request(*tasks[-1])
        facts = opened.facts(len(tasks) - 1)
    return {
        "arm": arm.name,
        "kind": arm.kind,
        "kernel": arm.kernel,
        "budget": arm.budget,
        "tokens_per_s": request.tokens_per_s,
        "prefill_s": request.prefill_s,
        "decoded": len(request.tokens) - 1,
        "tokens": request.tokens,
        "device_expert_bytes": None if arm.device_experts is None else arm.device_experts * model.layout.slot_bytes,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "seconds": time.perf_counter() - began,
        **facts,
    }


def compare(
    model: LiveModel, arms: Sequence[Arm], out: Path, tasks: Sequence[Task], *, repeats: int, end: float
) -> list[dict[str, Any]]:
    """Run all arms `repeats` times, in turn, until the time is up; write and return the rows.

    The first of several repeats decodes few tokens. Slow arms run in the second alone.
    """
    short = [Task(prompt, forced[:DROPPED_TOKENS]) for prompt, forced in tasks]
    once = min(1, repeats - 1)
    rows: list[dict[str, Any]] = []
    gone: set[str] = set()
    for repeat in range(repeats):
        for arm in arms:
            if arm.name in gone or (arm.slow and repeat != once):
                continue
            if time.monotonic() > end:
                print(f"time is up in repeat {repeat}: {arm.name} and what follows did not run", flush=True)
                return rows
            row: dict[str, Any]
            try:
                row = run_arm(arm, model, short if repeat < once else tasks)
            except Exception as error:  # the other arms are to run all the same
                gone.add(arm.name)
                row = {
                    "arm": arm.name,
                    "kind": arm.kind,
                    "error": _sentence(error),
                }
                del error
            row["repeat"] = repeat
            rows.append(row)
            with (out / "rows.jsonl").open("a") as file:
                file.write(json.dumps(_finite(row)) + "\n")
            print(_line(row), flush=True)
    return rows


def _sentence(error: Exception) -> str:
    """Return what an arm raised as one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['repeat']} {row['arm']:44} {row['error']}"
    hit = f"hit {row['hit_rate']:.3f}" if "hit_rate" in row else ""
    moved = f"{row['bytes_h2d'] / max(row['decoded'], 1) / 1e6:.0f} MB a token" if "bytes_h2d" in row else ""
    host = " ".join(f"{name} {ns / 1e3:.0f}" for name, ns in row.get("host_per_layer_ns", {}).items())
    return (
        f"{row['repeat']} {row['arm']:44} {row['tokens_per_s']:7.2f} tokens/s {hit} {moved} "
        f"{row['peak_device_bytes'] / 1e9:.1f} GB {row['seconds']:.1f} s {host} {' '.join(row.get('notes', []))}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where ours failed or gave another token than the resident model."""
    parser = argparse.ArgumentParser(prog="python -m real.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="start no arm after so many minutes")
    parser.add_argument("--where", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="olmoe")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--warm-up-tokens", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="decoded and timed; where a token takes seconds, the first 3")
    parser.add_argument("--skip-identity", action="store_true", help="do not check small models first")
    parser.add_argument(
        "--only", nargs="+", default=[], help="run only the arms whose name contains one of these texts, comma separated"
    )
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + 60 * chosen.minutes
    return ended(lambda: _run(chosen, end), f"the rows of all arms that were complete are in {chosen.out}")


def _run(chosen: argparse.Namespace, end: float) -> int:
    where, out = chosen.where, chosen.out
    check_gpu(where, "--where cpu --shape tiny")
    arms = _chosen_arms(separated(chosen.only))
    make_folder(out)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    identity = []
    if not chosen.skip_identity:
        identity = check_all(where, lambda row: print(json.dumps(row), flush=True))
        (out / "identity.json").write_text(json.dumps(identity, indent=1) + "\n")
    with device_errors("the model"):
        model = build_model(chosen.shape, where)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    tasks = tasks_of(vocabulary, chosen.prompt_tokens, chosen.warm_up_tokens, chosen.tokens)
    try:
        rows = compare(model, arms, out, tasks, repeats=chosen.repeats, end=end)
        summary = {
            "format": FORMAT,
            "model": model.name,
            "experts": [len(model.layers), model.experts, model.top_k],
            "expert_bytes": model.layout.expert_bytes,
            "device": device_name(where),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "prompt_tokens": chosen.prompt_tokens,
            "warm_up_tokens": chosen.warm_up_tokens,
            "identity": identity,
            **summarise(rows),
        }
    finally:
        model.close()
    (out / "summary.json").write_text(json.dumps(_finite(summary), indent=1) + "\n")
    print(table(summary))
    if where == "cpu":
        print(f"\nA {STAND_IN} times nothing: speeds, ratios and shares of the bound above mean nothing.")
    wrong = defects(summary) + [f"identity is not proved: {row['architecture']}" for row in identity if failed(row)]
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


def _chosen_arms(wanted: Sequence[str]) -> list[Arm]:
    """Return the arms whose name contains one of `wanted`, or all. Raises InputError for a text that no name contains."""
    arms = all_arms(BUDGETS)
    for text in wanted:
        if not any(text in arm.name for arm in arms):
            raise InputError(f"--only: no arm's name contains '{text}': known: {'; '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not wanted or any(text in arm.name for text in wanted)]


def _finite(value: Any) -> Any:
    """Return JSON values with null for what is no number."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
