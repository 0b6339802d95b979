"""The geometry of a DeepSeek model, in the words of its published config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "deepseek_v32": "sigmoid"}


@dataclass(frozen=True)
class Config:
    """What the blocks of `dsopt.models` are built from; `Config.of` makes it from a preset.

    scoring: "softmax" (V2) or "sigmoid" (V3, whose router also has a correction bias).
    n_group, topk_group: experts are chosen from the topk_group best of n_group groups; 1 and 1 for no groups.
    rope: the preset's `rope_parameters`: rope_theta, and for YaRN factor, beta_fast, beta_slow, mscale,
        mscale_all_dim, original_max_position_embeddings.
    index_topk: how many tokens V3.2's indexer lets a query see; None for no indexer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    scoring: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope: Mapping[str, Any]
    index_topk: int | None = None
    index_n_heads: int = 0
    index_head_dim: int = 0

    @classmethod
    def of(cls, preset: Mapping[str, Any], **changes: Any) -> Config:
        """The geometry of a preset of `dsopt.models.presets`, with `changes` to its entries.

        What a preset says beside the geometry (token ids, tied embeddings) is left aside. Raises ValueError
        for another model_type, TypeError for a change that is no entry of the geometry.
        """
        values = {**preset, **changes}
        model_type = values["model_type"]
        if model_type not in SCORING:
            raise ValueError(f"model_type must be one of {', '.join(SCORING)}, got {model_type!r}")
        values |= {"scoring": SCORING[model_type], "rope": values["rope_parameters"]}
        if values["scoring"] == "softmax" and values["topk_method"] == "greedy":
            values |= {"n_group": 1, "topk_group": 1}
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(changes) - {*known, *preset}):
            raise TypeError(f"unknown entries {', '.join(unknown)}; known entries: {', '.join(known)}")
        return cls(**{name: values[name] for name in known if name in values})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(qk_head_dim), times YaRN's mscale squared (DeepSeek-V2, section 3.1.4)."""
        return self.qk_head_dim**-0.5 * self._mscale(self.rope.get("mscale_all_dim") or 0.0) ** 2

    @property
    def rope_scale(self) -> float:
        """What YaRN multiplies cosines and sines by: 1 where mscale equals mscale_all_dim, as in every release."""
        if "factor" not in self.rope:
            return 1.0
        return self._mscale(self.rope["mscale"]) / self._mscale(self.rope["mscale_all_dim"])

    def _mscale(self, weight: float) -> float:
        factor = self.rope.get("factor", 1.0)
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
