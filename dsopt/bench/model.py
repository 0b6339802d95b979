"""Whole models with random weights: tokens a second over context, starts cold and warm, and a step's overhead."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsopt import compare
from dsopt.bench.overhead import Recorder, breakdown
from dsopt.models import presets
from dsopt.trial import Request, build

REPETITIONS = 5
OVERHEAD_CACHED = 128


@dataclass(frozen=True)
class ModelPlan:
    """What is measured on one model.

    context: tokens in the cache of each decode step; prefill: tokens of each prompt; ways: of compare.WAYS.
    overhead: numbers of layers, at tiny widths. tiny: the whole model at tiny widths.
    """

    preset: str
    layers: int
    dtype: str = "bfloat16"
    device: str = "cpu"
    context: Sequence[int] = (128, 2048, 8192)
    prefill: Sequence[int] = (512,)
    ways: Sequence[str] = compare.WAYS
    overhead: Sequence[int] = (3, 27)
    tiny: bool = False


Unit = tuple[str, int, Callable[[], dict[str, Any]]]


class Loaded:
    """The model that is in memory, at most one; what was compiled for one context serves the next."""

    def __init__(self, step: Callable[[str, str], None]):
        self.step = step
        self.plan: ModelPlan | None = None
        self._comparison: compare.Comparison | None = None

    def comparison(self, plan: ModelPlan) -> compare.Comparison:
        """The comparison on a plan's model, built if another one or none is there."""
        if plan != self.plan:
            self.release()
            request = Request(plan.preset, plan.tiny, plan.layers, plan.dtype)
            model = build(request, self.step).to(plan.device)
            self._comparison = compare.Comparison(
                model, lambda phase, detail: self.step(f"{plan.preset}: {phase}", detail)
            )
            self.plan = plan
        return self._comparison

    def release(self) -> None:
        self.plan = self._comparison = None
        # graphs hold weights in cycles; the next model needs their memory
        torch.compiler.reset()
        gc.collect()


def units(plan: ModelPlan, loaded: Loaded) -> Iterator[Unit]:
    """(what, size, how to measure it) of each part of a plan; measuring gives plain data.

    Starts come first, in processes of their own, while this one holds no weights.
    """
    if plan.device == "cpu":
        for way in [way for way in plan.ways if way != "eager"]:
            yield f"start of {way}", plan.context[0], lambda way=way: _starts(plan, way, loaded)
    for layers in plan.overhead:
        yield "overhead", layers, lambda layers=layers: overhead(plan.preset, layers, step=loaded.step)
    for cached in plan.context:
        yield "decode", cached, lambda cached=cached: _decode(plan, cached, loaded)
    for tokens in plan.prefill:
        yield "prefill", tokens, lambda tokens=tokens: _prefill(plan, tokens, loaded)


def _starts(plan: ModelPlan, way: str, loaded: Loaded) -> dict[str, Any]:
    loaded.release()
    loaded.step(f"{plan.preset}: starts of {way}", "cold and warm, in processes of their own")
    cold, warm = compare.starts(way, plan.preset, plan.layers, plan.context[0], plan.tiny)
    return {"way": way, "cold": cold, "warm": warm}


def _decode(plan: ModelPlan, cached: int, loaded: Loaded) -> dict[str, Any]:
    comparison = loaded.comparison(plan)
    return _rates(comparison.decode(cached, REPETITIONS, only=plan.ways), 1, comparison)


def _prefill(plan: ModelPlan, tokens: int, loaded: Loaded) -> dict[str, Any]:
    comparison = loaded.comparison(plan)
    return _rates(comparison.prefill(tokens, REPETITIONS, only=plan.ways), tokens, comparison)


def _rates(found: dict[str, Any], tokens: int, comparison: compare.Comparison) -> dict[str, Any]:
    rates = {way: tokens / seconds for way, seconds in found["seconds"].items()}
    return {**found, "tokens_per_s": rates, "failed": dict(comparison.failed)}


@torch.inference_mode()
def overhead(
    preset: str,
    layers: int,
    cached: int = OVERHEAD_CACHED,
    budget: float = 5.0,
    step: Callable[[str, str], None] = lambda what, detail: None,
) -> dict[str, Any]:
    """The breakdown of a decode step of a preset at tiny widths, which is an upper bound of all but kernels."""
    step(f"{preset}: overhead of a step", f"{layers} layers at tiny widths")
    config = presets.config(presets.tiny(presets.PRESETS[preset]()), num_hidden_layers=layers)
    recorder = Recorder()
    fast = presets.random_model(config)
    fast.compile(backend=recorder)
    cache = compare.filled_cache(config, cached)
    inputs = {
        "input_ids": compare.random_tokens(config.vocab_size, 1),
        "position_ids": torch.tensor([[cached]]),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    found = breakdown(lambda: fast(**inputs), recorder, lambda: compare.rewind(cache, cached), budget)
    return {"cached": cached, **found.to_dict()}


def known_ways(given: Collection[str] | None) -> tuple[str, ...]:
    """The ways asked for, all by default. Raises ValueError naming the known ones for another."""
    for way in given or ():
        if way not in compare.WAYS:
            raise ValueError(f"unknown way {way!r} to run a model; known ways: {', '.join(compare.WAYS)}")
    return compare.WAYS if given is None else tuple(w for w in compare.WAYS if w in given)
