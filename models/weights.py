"""Names of weights: those of published checkpoints and of transformers -> those of `dsopt.models.decoder`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# dotted part of a name -> its new name; what is not listed keeps its own
_PARTS = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
    "q_proj": "q",
    "q_a_proj": "q_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_b",
    "o_proj": "o",
    "wq_b": "q_b",
    "wk": "k",
    "weights_proj": "weights",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "shared_experts": "shared",
}
_ENDS = {
    ".mlp.gate.weight": ".mlp.router.weight",
    ".mlp.gate.e_score_correction_bias": ".mlp.router.bias",
    ".experts.gate_up_proj": ".experts.w13",
    ".experts.down_proj": ".experts.w2",
}


def rename(name: str) -> str:
    """What a `Decoder` calls the weight that DeepSeek's checkpoints and transformers call `name`.

    Stacked experts of transformers go to experts="stacked", the modules of each expert that checkpoints hold to the
    loops. No weight is permuted: both read the rotary part as pairs (x[2i], x[2i+1]).
    """
    for end, new in _ENDS.items():
        if name.endswith(end):
            name = name.removesuffix(end) + new
    return ".".join(_PARTS.get(part, part) for part in name.removeprefix("model.").split("."))


def load_transformers(decoder: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies weights under their published names into a `Decoder`. Raises RuntimeError for a missing or unknown one."""
    decoder.load_state_dict({rename(name): tensor for name, tensor in state.items()})
