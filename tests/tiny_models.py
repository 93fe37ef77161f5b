"""Random-initialised models of every architecture that recording is verified on, small enough for a test."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 96

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""What nearly every configuration calls by the same name."""

_EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
_EIGHT_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
_DENSE_FIRST = {"first_k_dense_replace": 1, "moe_intermediate_size": 24}

ARCHITECTURES = {
    "mixtral": ("MixtralConfig", _EIGHT_LOCAL),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EIGHT, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EIGHT, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EIGHT,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "olmoe": ("OlmoeConfig", _EIGHT),
    "flex_olmo": ("FlexOlmoConfig", _EIGHT),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_GROUPS, **_LATENT, **_DENSE_FIRST, "topk_method": "group_limited_greedy", "num_key_value_heads": 4},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_GROUPS, **_LATENT, **_DENSE_FIRST, "num_key_value_heads": 4}),
    "dots1": ("Dots1Config", {**_GROUPS, **_DENSE_FIRST, "head_dim": 8}),
    "glm4_moe": ("Glm4MoeConfig", {**_GROUPS, **_DENSE_FIRST, "head_dim": 8}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "phimoe": ("PhimoeConfig", _EIGHT_LOCAL),
    "gpt_oss": ("GptOssConfig", {**_EIGHT_LOCAL, "head_dim": 8, "sliding_window": 16}),
    "granitemoe": ("GraniteMoeConfig", {**_EIGHT_LOCAL, "residual_multiplier": 0.5}),
    "minimax_m2": ("MiniMaxM2Config", {**_EIGHT_LOCAL, "head_dim": 8}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_EIGHT,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 2, "head_dim": 8}),
    "jamba": (
        "JambaConfig",
        {
            **_EIGHT,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
}
"""Configuration class and what it needs besides `COMMON`: 4 layers, 8 experts, top-2, some layers dense."""

EXPERTS, TOP_K = 8, 2


def tiny_model(architecture: str, **changes: object) -> transformers.PreTrainedModel:
    """Build a model of `architecture` with fixed random weights, its routers far from balanced."""
    class_name, needed = ARCHITECTURES[architecture]
    config = getattr(transformers, class_name)(**{**COMMON, **needed, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or "expert_bias" in name:
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif "embed" in name or ".gate." in name or ".router." in name:
                tensor.copy_(torch.randn_like(tensor))
            elif ".experts." in name:
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model
