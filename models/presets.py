"""Geometry of the DeepSeek models in the words of transformers, and such models with random weights.

`PRESETS[name]()` gives the keyword arguments of the model's transformers config; `tiny` shrinks every width
and keeps the structure; `random_model` builds transformers' own class from them in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# a prime, so that the repeats of the random block do not line up with the rows of any weight
BLOCK = 4_194_301


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


def v2_lite() -> dict[str, Any]:
    """DeepSeek-V2-Lite, 16 billion parameters."""
    return {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(0.707),
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "tie_word_embeddings": False,
    }


def v2() -> dict[str, Any]:
    """DeepSeek-V2, 236 billion parameters: low-rank queries, experts chosen within groups."""
    return {
        **v2_lite(),
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "rope_parameters": _yarn(1.0),
    }


def v3() -> dict[str, Any]:
    """DeepSeek-V3 and -V3.1, 671 billion parameters: sigmoid scores with a correction bias."""
    return {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(1.0),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }


def v32() -> dict[str, Any]:
    """DeepSeek-V3.2: V3 with an indexer that picks 2048 tokens for each query."""
    return {
        **v3(),
        "model_type": "deepseek_v32",
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "v2-lite": v2_lite,
    "coder-v2-lite": v2_lite,
    "v2": v2,
    "v3": v3,
    "r1": v3,
    "v3.2": v32,
}


# a small size for any other decoder of transformers
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny(preset: dict[str, Any]) -> dict[str, Any]:
    """The same structure at widths small enough for a test: 3 layers, 4 heads, 8 experts."""
    small = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None if preset["q_lora_rank"] is None else 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": min(preset["n_group"], 2),
        "topk_group": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            **preset["rope_parameters"],
            "original_max_position_embeddings": 128,
            "factor": 32.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if "index_topk" in preset:
        small |= {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 32}
    return {**preset, **small}


def config(preset: dict[str, Any], **changes: Any) -> PreTrainedConfig:
    """The transformers config of a preset, `changes` on top; needs transformers."""
    from transformers import AutoConfig

    values = {**preset, **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Size of the weights of transformers' model for a config; allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> PreTrainedModel:
    """transformers' causal language model for a config in eval mode, its weights as `fill_random` makes them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    for module in model.modules():
        # computed buffers (rotary frequencies) are in no state dict: a fresh module computes them again
        if module._non_persistent_buffers_set:
            fresh = type(module)(config)
            for name in module._non_persistent_buffers_set:
                setattr(module, name, getattr(fresh, name))
    fill_random(model, seed, progress)
    return model.eval()


def fill_random(
    model: torch.nn.Module, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Fills a model's weights in place: random of scale 0.02, those of norms 1.

    Weights repeat one random block: gigabytes then take the time of a copy, not of a random generator.
    progress: called with the number of bytes filled after each weight.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, generator=generator).mul_(0.02)
    done = position = 0
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.fill_(1)
                continue
            block = block.to(tensor)
            rest = tensor.view(-1)
            while rest.numel():
                count = min(rest.numel(), BLOCK - position)
                rest[:count].copy_(block[position : position + count])
                rest, position = rest[count:], (position + count) % BLOCK
            done += tensor.numel() * tensor.element_size()
            progress(done)
