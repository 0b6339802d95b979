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
    fp8: bool = False


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
    """The model of a request, quantized if it asks for that. Raises MemoryError before it would not fit."""
    model = _wide(request, step)
    if request.fp8:
        from dsopt.fp8.convert import quantize_

        step("quantizing")
        quantize_(model, progress=False)
    return model


def _wide(request: Request, step: Callable[..., None]) -> torch.nn.Module:
    if request.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {request.dtype!r}; known: {', '.join(DTYPES)}")
    config, dtype = resolve(request), DTYPES[request.dtype]
    size, free = presets.weight_bytes(config, dtype), machine.memory()["available"]
    in_fp8 = request.weights and getattr(config, "quantization_config", None) is not None
    if in_fp8:
        size //= dtype.itemsize
    if free is not None and size > 0.9 * free:
        raise MemoryError(
            f"the weights take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "take fewer layers (--layers) or smaller ones (--tiny)"
        )
    if in_fp8:
        import dsopt

        step(f"loading {size / 2**30:.1f} GiB of weights")
        return dsopt.load(request.model, dtype=dtype, layers=request.layers, progress=False)
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
    import dsopt

    model = _checked(request, step)
    fast = dsopt.compile(model, kernels=dict(request.kernels)) if request.kernels else dsopt.compile(model)
    seconds = []
    inputs = _Inputs(model, request)
    for name in inputs.names("compiling and running the prompt"):
        step(name)
        start = time.perf_counter()
        logits = fast(**inputs.next).logits
        seconds.append(time.perf_counter() - start)
        inputs.advance(logits)
    report = dsopt.report(fast)
    figures = {"prompt": seconds[0], "decode": seconds[1:]}
    return {
        "model": request.model,
        "layers": inputs.config.num_hidden_layers,
        "seconds": figures,
    } | report.to_dict(), report


@torch.no_grad()
def verify(request: Request, step: Callable[..., None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compares the prompt and each decode step of a request with eager, site by site.

    Returns the figures and, by the name of the step, its `Verification`, whether or not it departs.
    """
    import dsopt

    model = _checked(request, step)
    results = {}
    inputs = _Inputs(model, request)
    for name in inputs.names("prompt"):
        step(f"comparing: {name}")
        try:
            results[name] = dsopt.verify(model, inputs.next, options={"kernels": dict(request.kernels)})
        except dsopt.VerifyError as error:
            results[name] = error.result
        inputs.advance(model(**inputs.next).logits)
    figures = {"model": request.model, "layers": inputs.config.num_hidden_layers}
    return figures | {"steps": {name: result.to_dict() for name, result in results.items()}}, results


def _checked(request: Request, step: Callable[..., None]) -> torch.nn.Module:
    """The model of a request, built once everything else that was asked for is known to be sound."""
    from dsopt.backend import Options, check_environment
    from dsopt.compare import quiet

    Options.of({"kernels": request.kernels})
    check_environment()
    quiet()
    return build(request, step)


class _Inputs:
    """What a model is called with: the prompt first, then one token at a time, over a static cache."""

    def __init__(self, model: torch.nn.Module, request: Request):
        from transformers import StaticCache

        from dsopt.compare import random_tokens

        self.config = model.config.get_text_config()
        self.steps, self.past = request.steps, 0
        self.cache = StaticCache(config=self.config, max_cache_len=request.tokens + request.steps)
        self.tokens = random_tokens(self.config.vocab_size, request.tokens)

    def names(self, prompt: str) -> list[str]:
        return [prompt, *(f"decode step {i + 1}" for i in range(self.steps))]

    @property
    def next(self) -> dict[str, Any]:
        return {
            "input_ids": self.tokens,
            "position_ids": torch.arange(self.past, self.past + self.tokens.shape[1])[None],
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def advance(self, logits: torch.Tensor) -> None:
        """Takes the likeliest token as the next one."""
        self.past += self.tokens.shape[1]
        self.tokens = logits[:, -1].argmax(-1, keepdim=True)
