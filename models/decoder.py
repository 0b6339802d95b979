"""A causal DeepSeek decoder in plain PyTorch, with a latent cache of fixed size.

decoder = make_decoder("v2-lite", layers=3)
cache = decoder.new_cache(batch=1, max_tokens=4096)
logits = decoder(ids, torch.arange(ids.shape[1]), cache)             # prefill
logits = decoder(next_id, torch.tensor([ids.shape[1]]), cache)       # decode
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsopt.models import presets
from dsopt.models.config import Config
from dsopt.models.experts import MoE
from dsopt.models.layers import GatedMLP, RMSNorm, Rope
from dsopt.models.mla import MLA, LayerCache


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a dense MLP in the first layers, experts in the others."""

    def __init__(self, config: Config, layer: int, absorbed: bool = False, experts: str = "stacked"):
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MLA(config, absorbed)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else MoE(config, experts)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: LayerCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result as in `MLA`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token ids -> logits, at the geometry of `config`.

    absorbed, experts: the spellings, see `MLA` and `MoE`. The config decides between V2, V3 and V3.2.
    """

    def __init__(self, config: Config, absorbed: bool = False, experts: str = "stacked"):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rope(config)
        self.layers = nn.ModuleList(
            Block(config, layer, absorbed, experts) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: list[LayerCache] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """(batch, new, vocab_size), or (batch, 1, vocab_size) if `last_only`.

        ids (batch, new), int64; positions (new,), int64: where the new tokens stand, the same for each row.
        A token sees those at its own and earlier positions. cache: from `new_cache`, written in place at
        `positions`; without one the new tokens are all there is.
        """
        cos, sin = self.rope(positions)
        held = positions if cache is None else torch.arange(cache[0].latent.shape[1], device=ids.device)
        mask = (held <= positions.unsqueeze(-1)).unsqueeze(0)
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if cache is None else cache[i], positions)
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def new_cache(self, batch: int, max_tokens: int) -> list[LayerCache]:
        """Zeroed buffers for each layer, of the weights' dtype and device."""
        config, like = self.config, self.embed.weight
        widths = [config.kv_lora_rank, config.qk_rope_head_dim]
        widths += [] if config.index_topk is None else [config.index_head_dim]
        return [LayerCache(*(like.new_zeros(batch, max_tokens, w) for w in widths)) for _ in self.layers]


def make_decoder(
    preset: str,
    layers: int | None = None,
    tiny: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    absorbed: bool = False,
    experts: str = "stacked",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **changes: Any,
) -> Decoder:
    """A Decoder in eval mode with random weights, in about the time it takes to fill them.

    preset: a key of `presets.PRESETS`. layers: how many instead of all. tiny: small widths, the same structure.
    absorbed, experts: see `MLA` and `MoE`. changes: other entries of the preset, such as n_routed_experts.
    progress: called with the number of bytes filled after each weight.
    Raises ValueError for an unknown preset, TypeError for an unknown change.
    """
    if preset not in presets.PRESETS:
        raise ValueError(f"preset must be one of {', '.join(presets.PRESETS)}, got {preset!r}")
    values = presets.PRESETS[preset]()
    if tiny:
        values = presets.tiny(values)
    if layers is not None:
        changes["num_hidden_layers"] = layers
    with torch.device("meta"):
        decoder = Decoder(Config.of(values, **changes), absorbed, experts).to(dtype)
    decoder.to_empty(device=device)
    presets.fill_random(decoder, seed, progress)
    return decoder.eval()
