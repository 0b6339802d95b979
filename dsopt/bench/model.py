"""Whole models with random weights."""

from __future__ import annotations

from typing import Any

import torch

from dsopt import compare
from dsopt.bench.overhead import Recorder, breakdown
from dsopt.models import presets


@torch.inference_mode()
def overhead(preset: str, layers: int, cached: int = 128, budget: float = 5.0) -> dict[str, Any]:
    """The breakdown of a decode step of a preset at tiny widths, which is an upper bound of all but kernels."""
    config = presets.config(presets.tiny(presets.PRESETS[preset]()), num_hidden_layers=layers)
    recorder = Recorder()
    fast = torch.compile(presets.random_model(config), backend=recorder)
    cache = compare.filled_cache(config, cached)
    inputs = {
        "input_ids": compare.random_tokens(config.vocab_size, 1),
        "position_ids": torch.tensor([[cached]]),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    found = breakdown(lambda: fast(**inputs), recorder, lambda: compare.rewind(cache, cached), budget)
    return {"preset": preset, "layers": layers, "cached": cached, **found.to_dict()}
