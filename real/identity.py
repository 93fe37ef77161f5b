"""Does offloading change a token? Small models of several architectures, generated with all experts resident and with few.

``python -m real.identity`` on a machine with a GPU; `real.peers` does it first. Each model is saved and loaded back, so
that the way from a checkpoint into the slab is tried too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from real.commands import ended
from real.driver import check_gpu
from real.live.model import LiveModel, load_model
from real.live.run import LiveRun
from real.systems import composition, read_system
from traces.errors import InputError, nearest

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 16, "num_experts_per_tok": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 96,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 64}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "residual_multiplier": 0.5}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["attention", "moe", "attention", "moe"],
            "head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 96,
            "moe_shared_expert_intermediate_size": 128,
        },
    ),
}
"""Configuration class and what it needs besides `COMMON`; biased, transposed and ungated experts are among them."""

SYSTEMS = ("lru_per_layer", "next_gate_lrfu", "fate")
BUDGETS = (0.25, 0.5)
NEW_TOKENS = 12


def prompts_of(vocabulary: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Return prompts of random tokens."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=random).tolist() for length in lengths]


def small_model(architecture: str) -> Any:
    """Build a model with random weights that routes differently from token to token."""
    class_name, needed = SMALL[architecture]
    config = getattr(transformers, class_name)(**{**COMMON, **needed})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed" in name or ".gate." in name or ".router." in name:
                tensor.copy_(torch.randn_like(tensor) * (1.0 if "embed" in name else 0.2))
            elif ".experts." in name:
                tensor.copy_(0.1 * torch.randn_like(tensor))
    return model


@contextmanager
def saved_and_loaded(architecture: str, where: str, dtype: str = "bfloat16") -> Iterator[LiveModel]:
    """Save a small model, load it with its experts in host memory, and close it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        small_model(architecture).to(getattr(torch, dtype)).save_pretrained(folder)
        live = load_model(folder, where)
    try:
        yield live
    finally:
        live.close()


def check_identity(architecture: str, where: str, *, graphs: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    """Generate with everything resident, then with each system at each budget; return what is to be known of it.

    ``different`` names the runs whose tokens differ from the resident model's, ``unproved`` those that missed no expert or
    brought none again, and so prove nothing; both have to be empty.
    """
    with saved_and_loaded(architecture, where, dtype) as live:
        prompts = prompts_of(int(COMMON["vocab_size"]), (23, 9, 31))
        everything = len(live.layers) * live.experts

        def run(system: str, slots: int, *, preload: bool = False) -> tuple[list[list[int]], int, int, list[str]]:
            with LiveRun(
                live,
                composition(read_system(system)),
                slots,
                requests=len(prompts),
                new_tokens=NEW_TOKENS,
                most_prompt_tokens=max(map(len, prompts)),
                graphs=graphs,
                preload=preload,
                prove=True,
            ) as opened:
                tokens = [opened.request(prompt).tokens for prompt in prompts]
                brought = [key for _, what, key, _ in opened.log if what in ("load", "prefetch")]
                again = len(brought) - len(set(brought))
                return tokens, int(opened.outcome().misses.sum()), again, opened.notes

        resident, missed, _, notes = run("lru", everything, preload=True)
        assert missed == 0, "the resident model misses experts"
        different: list[str] = []
        unproved: list[str] = []
        misses = runs = 0
        for system in SYSTEMS:
            for budget in BUDGETS:
                tokens, missed, again, _ = run(system, int(budget * everything))
                misses += missed
                runs += 1
                if tokens != resident:
                    different.append(f"{system} at {budget}")
                if not missed or not again:
                    unproved.append(f"{system} at {budget}")
        return {
            "architecture": architecture,
            "graphs": graphs and not notes,
            "notes": notes,
            "runs": runs,
            "misses": misses,
            "distinct_tokens": len({token for request in resident for token in request}),
            "different": different,
            "unproved": unproved,
        }


def failed(row: dict[str, Any]) -> bool:
    """Whether a row of `check_all` does not prove that offloading changes no token."""
    return "error" in row or bool(row["different"]) or bool(row["unproved"])


def check_all(where: str, say: Any = lambda row: None, architectures: Iterable[str] = tuple(SMALL)) -> list[dict[str, Any]]:
    """Check all `architectures`, without graphs and on a GPU also with them; a failure is a row with its sentence."""
    rows = []
    for architecture in architectures:
        for graphs in (False, True) if where != "cpu" else (False,):
            try:
                row = check_identity(architecture, where, graphs=graphs)
            except Exception as error:  # the others are to be tried all the same
                row = {"architecture": architecture, "graphs": graphs, "error": f"{type(error).__name__}: {error}"}
            rows.append(row)
            say(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m real.identity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=list(SMALL), help="check these architectures, comma separated")
    chosen = parser.parse_args(arguments)
    return ended(lambda: _run(chosen.where, separated(chosen.only)), "the checks that follow did not run")


def _run(where: str, only: list[str]) -> int:
    check_gpu(where)
    for name in only:
        if name not in SMALL:
            raise InputError(f"--only: '{name}' is no architecture that is checked: {nearest(name, SMALL)}")
    rows = check_all(where, lambda row: print(json.dumps(row), flush=True), only)
    return 1 if any(map(failed, rows)) else 0


def separated(words: Iterable[str]) -> list[str]:
    """Return the texts of an option that are separated by commas, by spaces or by both; a quoted text keeps its spaces."""
    return [text.strip() for word in words for text in word.split(",") if text.strip()]


if __name__ == "__main__":
    sys.exit(main())
