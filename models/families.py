"""Every causal family of transformers with latent attention or experts, at a geometry small enough for a test.

`families()` finds them in the installed transformers; `tiny` shrinks a family's own default config, so that a
model of it holds one layer of each kind; `build` makes that model with random weights.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LATENT = re.compile(r"\bkv_lora_rank\b")
EXPERTS = re.compile(r"use_experts_implementation|^class \w*(Experts|SparseMoe|MoE|MOE|SparseMLP)\w*\(", re.M)
VOCABULARY = 120


@dataclass(frozen=True)
class Family:
    """One modeling file. model_type: of the text config that `tiny` shrinks, "" if the file has none."""

    name: str
    model_type: str
    has_latent: bool
    has_experts: bool


def families() -> list[Family]:
    """The families of the installed transformers whose modeling file has latent attention or experts."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    types: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        types.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source, name = file.read_text(encoding="utf-8"), file.parent.name
        latent, experts = bool(LATENT.search(source)), bool(EXPERTS.search(source))
        if (latent or experts) and file.stem == f"modeling_{name}":
            found.append(Family(name, _text_type(types.get(name, [])), latent, experts))
    return found


def _text_type(types: list[str]) -> str:
    """The model type of a family's text decoder."""
    text = sorted((t for t in types if t.endswith("_text")), key=len)
    return next(iter(text or types), "")


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda default: min(default, limit)


# what a field of a config becomes, by its name: a number, or a function of the default
SHRINK: dict[str, int | Callable[[int], int]] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "moe_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(
        ("dense_intermediate_size", "shared_intermediate_size", "share_expert_dim"), _at_most(80)
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"), 40),
    "shared_experts_intermediate_size": 40,
    **dict.fromkeys(("num_attention_heads", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_sliding_attention_heads", "num_attention_groups"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim"), _at_most(16)),
    **dict.fromkeys(("rotary_dim", "query_pre_attn_scalar", "d_rel"), _at_most(8)),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 8),
    "zero_expert_num": 4,
    "hc_lowrank": 24,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k"), _at_most(2)),
    **dict.fromkeys(("n_group", "topk_group"), _at_most(2)),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), _at_most(2)),
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": _at_most(16),
    "v_head_dim": 24,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "index_kpool": 4,
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 16),
    **dict.fromkeys(("n_groups", "o_groups"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 8),
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 256),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), _at_most(1)),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 2),
    "rel_extent": 16,
    "hidden_size_per_layer_input": 16,
    "num_nextn_predict_layers": 0,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "top_k_experts")

# where a config needs more than its fields one by one
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    # one expert for each pair of keys
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    # its sliding layers have a geometry of their own
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 48,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 36,
        "swa_qk_nope_head_dim": 20,
        "swa_v_head_dim": 24,
    },
    "diffusion_gemma": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "global_head_dim": 16,
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [48, 48],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 4]},
    },
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "global_head_dim": 16,
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
    },
    "flint": {"mlp_only_layers": [0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 16},
    # relative positions have one table entry for each head
    "inkling": {"num_key_value_heads": 2, "swa_num_key_value_heads": 2},
    "inkling2": {"num_key_value_heads": 2, "swa_num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    # dense and expert layers, chunked attention with a rotation and full attention without
    "llama4": {
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "step3p7": {"sliding_window": 8},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
}
# top-1 routing is all these do
CHOOSES_ONE = ("zaya",)


def tiny(family: Family, choose_all: bool = False) -> PreTrainedConfig:
    """The family's default text config with every width shrunk and one layer of each kind.

    choose_all: every expert and every token is chosen, so that no rounding can choose otherwise.
    Raises what the config class raises for values that do not fit together.
    """
    from transformers import AutoConfig

    default = AutoConfig.for_model(family.model_type)
    default.allow_global_per_layer_attribute_access = True
    fields = {f.name: getattr(default, f.name, None) for f in dataclasses.fields(default)}
    values: dict[str, Any] = {f: SPECIAL.get(f, 3) for f in fields if f.endswith("_token_id")}
    for name, change in SHRINK.items():
        old = fields.get(name)
        if type(old) is int:
            values[name] = change(old) if callable(change) else change
    if (heads := fields.get("num_attention_heads")) and type(fields.get("num_key_value_heads")) is int:
        groups = heads // fields["num_key_value_heads"]
        values["num_key_value_heads"] = {1: 4, heads: 1}.get(groups, 2)
    values |= _layers(fields)
    values |= OVERRIDES.get(family.name, {})
    if choose_all and family.name not in CHOOSES_ONE:
        values |= _choose_all(values)
    return AutoConfig.for_model(family.model_type, **values)


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The first layer of each kind, where a config lists a kind for every layer."""
    count = fields.get("num_hidden_layers")
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == count and count}
    # a list of layers' own numbers says nothing of their kinds; the config makes it again
    lists = {k: v for k, v in lists.items() if v != list(range(count))}
    if not lists:
        return {}
    kinds = list(zip(*lists.values()))
    first = sorted({kinds.index(kind) for kind in kinds})
    chosen = first if len(first) > 1 else [0, 1]
    return {"num_hidden_layers": len(chosen), **{k: [v[i] for i in chosen] for k, v in lists.items()}}


def _choose_all(values: dict[str, Any]) -> dict[str, Any]:
    experts = next((values[name] for name in EXPERT_COUNTS if name in values), 0)
    every = {name: experts for name in CHOICES if name in values}
    if "n_group" in values:
        every["topk_group"] = values["n_group"]
    if "index_topk" in values:
        every["index_topk"] = values["max_position_embeddings"]
    return every


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal model for a text config, or the text decoder of a model that also sees or hears."""
    from transformers import PreTrainedModel

    if config.is_encoder_decoder:
        raise ValueError("an encoder and a decoder, no causal model")
    folder = type(config).__module__.rpartition(".")[0]
    module = importlib.import_module(f"{folder}.modeling_{folder.rpartition('.')[2]}")
    classes = {
        name: c
        for name, c in vars(module).items()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.config_class is type(config)
    }
    for ending in ("ForCausalLM", "TextModel", "Model"):
        for name, model in classes.items():
            if name.endswith(ending) and not name.endswith("PreTrainedModel"):
                return model
    raise ValueError(f"no causal text model of {type(config).__name__}")


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The causal model of a config, or its text decoder where it has no head, in float32 and eval mode.

    Random weights are large enough that every part moves the output, biases and norm weights included.
    Raises ValueError for a config whose model is no causal text model.
    """
    torch.manual_seed(seed)
    model = _model_class(config)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.ndim == 1:
                p.normal_(std=0.1)
            else:
                p.normal_(std=0.7 * p.shape[-1] ** -0.5)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():
                b.uniform_(-0.1, 0.1)
    return model.eval()


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """The model in bfloat16 as transformers loads one: some weights and what is computed stay in float32. In place."""
    kept = [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in model._keep_in_fp32_modules_strict]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.bfloat16()
    return model
