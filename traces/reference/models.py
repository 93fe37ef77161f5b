"""The two models that this project trains and records, and how: everything that is chosen stands here.

Their shapes are those of published models, so that each can be priced with the bytes of one
(``model=olmoe_1b_7b``, ``model=gpt_oss_20b``). They differ in everything that a policy could come to rely on:
depth, width, number of experts, top-k, and what the router does. The first has the OLMoE architecture: weights
of the chosen experts sum to 1, and nothing but the routed experts works on a token. The second has the
Qwen2-MoE architecture: weights are plain softmax shares, so that their sum says how sure the router is, and a
shared expert takes what all tokens need. Sources: the architectures' implementations in transformers 5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from traces.errors import InputError, nearest


@dataclass(frozen=True)
class Training:
    """How a model is trained. Time ends it: the schedule follows the clock, or the steps where those are limited."""

    sequence: int = 1024
    """Tokens of one sequence."""
    batch: int = 32
    """Sequences of one step, the domains in turn."""
    peak_rate: float = 1.5e-3
    """Of AdamW with betas (0.9, 0.95), after the warm-up; then a cosine down to 4% of it."""
    warmup_steps: int = 150
    weight_decay: float = 0.1
    """On matrices only."""
    balance: float = 0.01
    """Factor of the load-balancing loss, which is 1 at even use, computed in each layer and averaged over them."""
    router_z: float = 0.001
    """Factor of the squared logarithm of the router's partition function, averaged over layers."""
    held_out_sequences: int = 128
    """The most of each domain that are validated on, spread over its held-out text."""
    most_steps: int | None = None
    """Steps after which training ends before its time does; None for no limit."""


@dataclass(frozen=True)
class Recording:
    """What is recorded of a trained model. One round is one request of each domain."""

    rounds: int = 4
    rounds_per_batch: int = 2
    """Decoded together. A batch is begun only when there is time to end it."""
    prompt_tokens: int = 64
    """Of held-out text."""
    sampled_tokens: int = 256
    temperature: float = 0.8
    depth: int = 3
    """Layers of lookahead."""
    predictions: int = 16
    """Experts ranked by each lookahead."""
    residual_cosine: bool = True


@dataclass(frozen=True)
class Bundled:
    """Which part of the recording comes with the package."""

    rounds: int
    """Requests of each domain."""
    tokens: int
    """First tokens of each request."""
    most_bytes: int
    """Size that the file may have: it is downloaded with every installation."""


@dataclass(frozen=True)
class ReferenceModel:
    """One model of this project's own."""

    name: str
    """Of its recording, as in ``trace=NAME``."""
    title: str
    """Of the model, in tables."""
    architecture: str
    """transformers' name of it."""
    shape: Mapping[str, Any]
    """Arguments of its configuration, without what all models here share (`configuration`)."""
    seed: int
    """Of the initial weights, the order of the text, the prompts and the sampling."""
    bundled: Bundled
    training: Training = field(default_factory=Training)
    recording: Recording = field(default_factory=Recording)

    @property
    def layers(self) -> int:
        """Number of MoE layers, which all layers are."""
        return int(self.shape["num_hidden_layers"])

    def configuration(self, vocabulary: int) -> dict[str, Any]:
        """Return the arguments of transformers' configuration."""
        longest = max(self.training.sequence, self.recording.prompt_tokens + self.recording.sampled_tokens)
        return {
            "vocab_size": vocabulary,
            "max_position_embeddings": 2 * longest,
            "tie_word_embeddings": True,
            # A padding token's embedding gets no gradient, and some architectures name a real token by default.
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            **self.shape,
        }

    def as_json(self) -> dict[str, Any]:
        """Return all settings as JSON values."""
        return asdict(self)


MODELS: Mapping[str, ReferenceModel] = {
    model.name: model
    for model in (
        ReferenceModel(
            name="reference_16x64_top8",
            title="foregate reference MoE (OLMoE architecture)",
            architecture="olmoe",
            shape={
                "hidden_size": 512,
                "num_hidden_layers": 16,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "intermediate_size": 256,
                "norm_topk_prob": True,
            },
            seed=1,
            bundled=Bundled(rounds=2, tokens=160, most_bytes=12_000_000),
        ),
        ReferenceModel(
            name="reference_24x32_top4",
            title="foregate second reference MoE (Qwen2-MoE architecture)",
            architecture="qwen2_moe",
            shape={
                "hidden_size": 384,
                "num_hidden_layers": 24,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "num_experts": 32,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 384,
                "shared_expert_intermediate_size": 384,
                "norm_topk_prob": False,
            },
            seed=2,
            # Prompts are shorter, because 24 layers leave room for fewer tokens in the bundled file.
            recording=Recording(prompt_tokens=32, predictions=8),
            bundled=Bundled(rounds=2, tokens=110, most_bytes=6_000_000),
        ),
    )
}


def reference_model(name: str) -> ReferenceModel:
    """Return the model called `name`. Raises `InputError` when there is none."""
    if name not in MODELS:
        raise InputError(f"there is no reference model '{name}'; {nearest(name, MODELS)}")
    return MODELS[name]


def tiny(model: ReferenceModel) -> ReferenceModel:
    """Return a model of the same architecture that trains and records within seconds on any machine.

    It shows that the steps work, and nothing about routing.
    """
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if model.architecture == "olmoe" else 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    return replace(
        model,
        name=f"tiny_{model.name}",
        title=f"tiny {model.title}",
        shape={**model.shape, **{key: sizes[key] for key in model.shape if key in sizes}},
        training=replace(model.training, sequence=32, batch=7, warmup_steps=2, held_out_sequences=14, most_steps=4),
        recording=replace(model.recording, rounds=2, prompt_tokens=8, sampled_tokens=6, depth=2, predictions=4),
        bundled=replace(model.bundled, rounds=1, tokens=12),
    )
