"""What recording costs in tokens/s: ``python -m benchmarks.recorder_overhead``; prints JSON.

One model of random weights, by default of OLMoE-1B-7B's shape in bfloat16 on CUDA, runs the recorder's own generation loop
bare and under `record`, in turn, several times; medians are compared. A batch is timed from the end of the batch before it,
so everything that grows with a recording counts (hooks, copies, checks, files) and what happens once per recording
(loading, the probe, the trace at the end) does not. Needs torch and transformers, and nothing of the command line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from traces import Trace
from traces.recorder import Prompt, RecordOptions, record
from traces.recorder.generation import forward_passes

OLMOE_1B_7B = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
TINY = {**OLMOE_1B_7B, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY["num_key_value_heads"] = 4

ARMS: dict[str, dict[str, Any]] = {
    "ids and weights": {},
    "with logits": {"router_logits": "float16"},
    "with lookahead 3": {"lookahead": 3},
    "with lookahead 3, norms and cosine": {"lookahead": 3, "expert_output_norm": True, "residual_cosine": True},
}
"""What is recorded, by the name of the arm."""

TIMED_BATCHES = 2
"""Per repeat, after one that warms up."""


def main() -> None:
    """Measure every arm at every batch size and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--config", help="JSON of OlmoeConfig's arguments, instead of OLMoE-1B-7B's")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the script, measures nothing")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args()
    shape = json.loads(arguments.config) if arguments.config else TINY if arguments.tiny else OLMOE_1B_7B
    model = random_model(shape, arguments.device, getattr(torch, arguments.dtype))
    print(json.dumps(measure(model, arguments), indent=1))


def random_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Return a model of random weights whose tokens, and so whose routing, vary."""
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.OlmoeConfig(**shape, eos_token_id=None, pad_token_id=0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    return model.eval()


def measure(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return medians of tokens/s, and of the overhead within each repeat, for every batch size and arm."""
    device = next(model.parameters()).device
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": arguments.dtype,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "batch_sizes": {},
    }
    for size in arguments.batch_sizes:
        rng = np.random.default_rng(size)
        tokens = rng.integers(3, model.config.vocab_size, ((1 + TIMED_BATCHES) * size, arguments.prompt_tokens))
        prompts = [Prompt(f"prompt {number}", None, tuple(ids.tolist())) for number, ids in enumerate(tokens)]
        rates: dict[str, list[float]] = {arm: [] for arm in ("bare", *arguments.arms)}
        # The first repeat meets cold caches and is dropped.
        for repeat in range(1 + arguments.repeats):
            print(f"batch size {size}, repeat {repeat} of {arguments.repeats}", file=sys.stderr)
            rates["bare"].append(bare_rate(model, prompts, options_of(arguments, size, {})))
            for arm in arguments.arms:
                rate, trace = recorded_rate(model, prompts, options_of(arguments, size, ARMS[arm]))
                rates[arm].append(rate)
        found["batch_sizes"][size] = {
            "distinct_tokens": len(np.unique(trace.token_ids)),
            "tokens_per_s": {arm: statistics.median(values[1:]) for arm, values in rates.items()},
            "spread_of_tokens_per_s": {arm: [min(values[1:]), max(values[1:])] for arm, values in rates.items()},
            "overhead": {
                arm: statistics.median(bare / rate - 1 for bare, rate in zip(rates["bare"][1:], rates[arm][1:], strict=True))
                for arm in arguments.arms
            },
        }
    return found


def options_of(arguments: argparse.Namespace, size: int, wanted: dict[str, Any]) -> RecordOptions:
    """Return the options of one arm."""
    return RecordOptions(batch_size=size, new_tokens=arguments.new_tokens, stop_at_end=False, temperature=1.0, **wanted)


def bare_rate(model: Any, prompts: list[Prompt], options: RecordOptions) -> float:
    """Return tokens/s of the generation loop alone, prompt tokens included."""
    ends = [0.0]
    for batch in range(1 + TIMED_BATCHES):
        chosen = prompts[batch * options.batch_size : (batch + 1) * options.batch_size]
        for _ in forward_passes(model, [prompt.token_ids or () for prompt in chosen], options, batch):
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return tokens_of(prompts, options) / (ends[-1] - ends[1])


def recorded_rate(model: Any, prompts: list[Prompt], options: RecordOptions) -> tuple[float, Trace]:
    """Return tokens/s of the same batches under `record`, and the trace."""
    ends: dict[int, float] = {}

    def progress(done: int, total: int, how: str) -> None:
        ends.setdefault(done, time.perf_counter())  # 0 comes during the first batch, n when the n-th counts

    with tempfile.TemporaryDirectory() as folder:
        trace = record(model, prompts, Path(folder) / "trace.safetensors", options, progress=progress)
    return tokens_of(prompts, options) / (ends[1 + TIMED_BATCHES] - ends[1]), trace


def tokens_of(prompts: list[Prompt], options: RecordOptions) -> int:
    """Return how many tokens the timed batches have."""
    timed = prompts[options.batch_size :]
    return sum(len(prompt.token_ids or ()) + options.new_tokens for prompt in timed)


if __name__ == "__main__":
    main()
