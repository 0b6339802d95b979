"""One model compiled and run for a few tokens, to see what dsopt does to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsopt import machine
from dsopt.models import presets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What to build and run. model: a preset, a transformers model type, or a folder with config.json."""

    model: str
    tiny: bool = False
    layers: int | None = None
    dtype: str = "bfloat16"
    weights: bool = False
    tokens: int = 32
    steps: int = 3
    kernels: Mapping[str, str] = field(default_factory=dict)


def resolve(request: Request) -> Any:
    """The transformers config of a request. Raises ValueError naming what is known for an unknown model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    changes = {} if request.layers is None else {"num_hidden_layers": request.layers}
    by_type = {make()["model_type"]: make for make in reversed(presets.PRESETS.values())}
    if (make := presets.PRESETS.get(request.model) or by_type.get(request.model)) is not None:
        return presets.config(presets.tiny(make()) if request.tiny else make(), **changes)
    if (Path(request.model) / "config.json").is_file():
        config = AutoConfig.from_pretrained(request.model, local_files_only=True)
        if request.tiny:
            raise ValueError(
                "--tiny changes a preset or a model type, not a folder's config; use --layers there"
            )
        for name, value in changes.items():
            setattr(config, name, value)
        return config
    if request.model not in CONFIG_MAPPING:
        raise ValueError(
            f"{request.model!r} is no folder with a config.json, no model type of transformers, no preset; "
            f"presets: {', '.join(presets.PRESETS)}"
        )
    return AutoConfig.for_model(request.model, **(presets.TINY if request.tiny else {}), **changes)


def build(request: Request, step: Callable[..., None]) -> torch.nn.Module:
    """The model of a request. Raises MemoryError before it would not fit."""
    if request.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {request.dtype!r}; known: {', '.join(DTYPES)}")
    config, dtype = resolve(request), DTYPES[request.dtype]
    size, free = presets.weight_bytes(config, dtype), machine.memory()["available"]
    if free is not None and size > 0.9 * free:
        raise MemoryError(
            f"the weights take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "take fewer layers (--layers) or smaller ones (--tiny)"
        )
    if request.weights:
        from transformers import AutoModelForCausalLM

        step(f"loading {size / 2**30:.1f} GiB of weights")
        return AutoModelForCausalLM.from_pretrained(
            request.model, config=config, dtype=dtype, local_files_only=True
        ).eval()
    return presets.random_model(
        config,
        dtype,
        progress=lambda done: step("filling weights", f"{done / size:.0%} of {size / 2**30:.1f} GiB"),
    )


@torch.inference_mode()
def run(request: Request, step: Callable[..., None]) -> tuple[dict[str, Any], Any]:
    """Compiles the model, runs a prompt and decode steps; returns the figures and dsopt's report."""
    from transformers import StaticCache

    import dsopt
    from dsopt.backend import Options, check_environment
    from dsopt.compare import quiet, random_tokens

    Options.of({"kernels": request.kernels})
    check_environment()
    quiet()
    model = build(request, step)
    fast = dsopt.compile(model, kernels=dict(request.kernels)) if request.kernels else dsopt.compile(model)
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=request.tokens + request.steps)
    tokens = random_tokens(config.vocab_size, request.tokens)
    seconds = []
    for index in range(request.steps + 1):
        step("compiling and running the prompt" if index == 0 else f"decode step {index}")
        past = 0 if index == 0 else request.tokens + index - 1
        positions = torch.arange(past, past + tokens.shape[1])[None]
        start = time.perf_counter()
        logits = fast(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        seconds.append(time.perf_counter() - start)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
    report = dsopt.report(fast)
    figures = {"prompt": seconds[0], "decode": seconds[1:]}
    return {
        "model": request.model,
        "layers": config.num_hidden_layers,
        "seconds": figures,
    } | report.to_dict(), report
