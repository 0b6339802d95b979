"""Parts of transformers' own decoder layers at small geometry, and inputs under which all of a part matters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from families import YARN, build
from transformers import StaticCache

import dsopt
from dsopt.fp8 import FP8Block

# tables and softmax scale both differ from plain RoPE's by more than bfloat16 rounds
STRONG_YARN = {**YARN, "mscale": 3.0, "mscale_all_dim": 1.0}
GEOMETRY = {
    "num_hidden_layers": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    # as wide as the latent, so that absorbed queries could pass for queries
    "qk_nope_head_dim": 32,
    "rope_parameters": STRONG_YARN,
}
# the numbers of tokens in a batch, of those that `decode` finds in its cache, and of the slots in that
TOKENS, HELD, SLOTS = 12, 9, 16


@dataclass
class Block:
    """The only decoder layer of a tiny model, with its rotary tables."""

    layer: torch.nn.Module
    rotary: torch.nn.Module
    config: Any

    def to(self, dtype: torch.dtype) -> Block:
        """A copy in another dtype; in float64 its experts run one by one, as grouped GEMMs have no float64."""
        block = copy.deepcopy(self)
        block.layer.to(dtype)
        if dtype == torch.float64:
            block.config._experts_implementation = "eager"
        return block

    def tokens(self, size: float = 1.0) -> torch.Tensor:
        """Hidden states (2, TOKENS, hidden) in the layer's dtype, the same numbers at each call."""
        x = torch.randn(2, TOKENS, self.config.hidden_size, generator=torch.Generator().manual_seed(1))
        return (size * x).to(self.layer.input_layernorm.weight.dtype)

    def prefill(self, size: float = 1.0) -> dict[str, Any]:
        """Arguments of the layer: all tokens at once, without a cache."""
        return self._inputs(self.tokens(size), 0)

    def decode(self) -> dict[str, Any]:
        """Arguments of the layer: the last tokens, on a cache with free slots that holds those before."""
        cache = StaticCache(config=self.config, max_cache_len=SLOTS)
        for start, end in ((0, HELD), (HELD, TOKENS)):
            inputs = self._inputs(self.tokens()[:, start:end], start)
            seen = torch.arange(SLOTS) <= torch.arange(start, end)[:, None]
            inputs |= {"past_key_values": cache, "attention_mask": seen[None, None]}
            if end == HELD:
                with torch.no_grad():
                    self.layer(**inputs)
        return inputs

    def _inputs(self, x: torch.Tensor, start: int) -> dict[str, Any]:
        positions = torch.arange(start, start + x.shape[1])[None]
        return {"hidden_states": x, "position_embeddings": self.rotary(x, positions)}


def block(family: str, mlp: str, dtype: torch.dtype = torch.float32) -> Block:
    """The layer of `family` ("v2" or "v3"); mlp: "experts", chosen by groups and a strong bias, "dense" or "none".

    "v3-fp8" is "v3" with weights in FP8.
    """
    family, _, fp8 = family.partition("-")
    greedy = {"topk_method": "group_limited_greedy"} if family == "v2" else {}
    model = build(family, first_k_dense_replace=int(mlp != "experts"), **greedy, **GEOMETRY)
    for name, bias in model.named_buffers():
        if "correction_bias" in name:
            bias.uniform_(-0.5, 0.5)
    layer = model.model.layers[0]
    if mlp == "none":
        layer.mlp = torch.nn.Identity()
    if fp8:
        dsopt.quantize_(layer, FP8Block(rows=16, columns=16))
    return Block(layer, model.model.rotary_emb, model.config).to(dtype)


class NormedMLP(torch.nn.Module):
    """The second half of a layer without its residual."""

    def __init__(self, of: Block):
        super().__init__()
        self.norm, self.mlp = of.layer.post_attention_layernorm, of.layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x))


class Shard(torch.nn.Module):
    """The experts of a layer on a device of expert parallelism that runs the first half of them.

    The ids of others become num_experts, which is no expert's; their weights stay.
    """

    def __init__(self, of: Block):
        super().__init__()
        self.router, self.experts = of.layer.mlp.gate, of.layer.mlp.experts
        self.experts._is_expert_parallel = True
        self.held = self.experts.num_experts // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.router(x)
        return self.experts(x, ids.masked_fill(ids >= self.held, self.experts.num_experts), weights)
