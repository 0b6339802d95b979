"""transformers' own classes at small geometry, one entry a family and variation the passes must match."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 64,
}
SHARED = {
    "vocab_size": 120,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MLA = {
    **SHARED,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 20,
    "head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
}


def _heads(n: int, hidden: int) -> dict:
    return {"num_attention_heads": n, "num_key_value_heads": n, "hidden_size": hidden}


# name -> config arguments, and how many sites of each family two layers hold
FAMILIES: dict[str, tuple[dict, dict[str, int]]] = {
    "v2": (
        {"model_type": "deepseek_v2", **MLA, **_heads(5, 80), "q_lora_rank": None, "rope_parameters": YARN},
        {"mla": 2, "attention": 0, "moe": 1, "router": 1, "norm": 7, "rope": 4, "mlp": 2},
    ),
    "v2-q_lora": (
        {
            "model_type": "deepseek_v2",
            **MLA,
            **_heads(6, 96),
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
        },
        {"mla": 2, "attention": 0, "moe": 1, "router": 1, "norm": 9, "rope": 4, "mlp": 2},
    ),
    "v3": (
        {"model_type": "deepseek_v3", **MLA, **_heads(5, 64), "q_lora_rank": 48, "rope_parameters": YARN},
        {"mla": 2, "attention": 0, "moe": 1, "router": 1, "norm": 9, "rope": 4, "mlp": 2},
    ),
    "v3-half-biased": (
        {
            "model_type": "deepseek_v3",
            **MLA,
            **_heads(6, 64),
            "q_lora_rank": 48,
            "rope_interleave": False,
            "attention_bias": True,
        },
        {"mla": 2, "attention": 0, "moe": 1, "router": 1, "norm": 9, "rope": 4, "mlp": 2},
    ),
    "v32": (
        {
            "model_type": "deepseek_v32",
            **MLA,
            **_heads(5, 64),
            "q_lora_rank": 48,
            "index_topk": 8,
            "index_n_heads": 2,
            "index_head_dim": 32,
        },
        {"mla": 2, "attention": 0, "moe": 1, "router": 1, "norm": 9, "rope": 8, "mlp": 2},
    ),
    "mixtral": (
        {
            "model_type": "mixtral",
            **SHARED,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
        },
        {"mla": 0, "attention": 2, "moe": 2, "router": 2, "norm": 5, "rope": 4, "mlp": 0},
    ),
    "qwen3_moe": (
        {
            "model_type": "qwen3_moe",
            **SHARED,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
        {"mla": 0, "attention": 2, "moe": 2, "router": 2, "norm": 9, "rope": 4, "mlp": 0},
    ),
    "gpt_oss": (
        {
            "model_type": "gpt_oss",
            **SHARED,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attn_implementation": "eager",  # the only one that has sinks
        },
        {"mla": 0, "attention": 2, "moe": 2, "router": 2, "norm": 5, "rope": 4, "mlp": 0},
    ),
    "llama": (
        {
            "model_type": "llama",
            **SHARED,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
        },
        {"mla": 0, "attention": 2, "moe": 0, "router": 0, "norm": 5, "rope": 4, "mlp": 2},
    ),
    "qwen2": (
        {
            "model_type": "qwen2",
            **SHARED,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "hidden_size": 80,
        },
        {"mla": 0, "attention": 2, "moe": 0, "router": 0, "norm": 5, "rope": 4, "mlp": 2},
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **overrides):
    """The family's model with random weights large enough that every part of it moves the logits."""
    arguments = {**FAMILIES[family][0], **overrides}
    attention = arguments.get("attn_implementation", attention)
    config = AutoConfig.for_model(**arguments)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.ndim == 1:
                p.normal_(std=0.1)
            else:
                p.normal_(std=0.7 * p.shape[-1] ** -0.5)
        for name, b in model.named_buffers():
            if "correction_bias" in name:
                b.uniform_(-0.1, 0.1)
    return model.to(dtype).eval()


def all_experts(config: dict) -> dict:
    """Overrides under which every expert is chosen, so that no rounding can choose otherwise."""
    if "n_routed_experts" in config:
        return {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 2}
    count = next((name for name in ("num_local_experts", "num_experts") if name in config), None)
    return {} if count is None else {count: 4, "num_experts_per_tok": 4}
