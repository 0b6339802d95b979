"""Whole models with random weights: tokens a second over context, starts cold and warm, and a step's overhead."""

from __future__ import annotations

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


def units(plan: ModelPlan, step: Callable[[str, str], None]) -> Iterator[Unit]:
    """(what, size, how to measure it) of each part of a plan; the model is built when the first part needs it.

    Starts come first, in processes of their own, while this one holds no weights. Each part gives plain data.
    """
    if plan.device == "cpu":
        for way in [way for way in plan.ways if way != "eager"]:
            yield f"start of {way}", plan.context[0], lambda way=way: _starts(plan, way, step)
    for layers in plan.overhead:
        yield "overhead", layers, lambda layers=layers: overhead(plan.preset, layers, step=step)
    shared = _Shared(plan, step)
    for cached in plan.context:
        yield "decode", cached, lambda cached=cached: shared.decode(cached)
    for tokens in plan.prefill:
        yield "prefill", tokens, lambda tokens=tokens: shared.prefill(tokens)


def _starts(plan: ModelPlan, way: str, step: Callable[[str, str], None]) -> dict[str, Any]:
    step(f"{plan.preset}: starts of {way}", "cold and warm, in processes of their own")
    cold, warm = compare.starts(way, plan.preset, plan.layers, plan.context[0], plan.tiny)
    return {"way": way, "cold": cold, "warm": warm}


class _Shared:
    """One model for all contexts, so that what was compiled serves the next one."""

    def __init__(self, plan: ModelPlan, step: Callable[[str, str], None]):
        self.plan, self.step = plan, step
        self.comparison: compare.Comparison | None = None

    def _model(self) -> compare.Comparison:
        if self.comparison is None:
            plan = self.plan
            request = Request(plan.preset, plan.tiny, plan.layers, plan.dtype)
            model = build(request, self.step).to(plan.device)
            self.comparison = compare.Comparison(
                model, lambda *said: self.step(f"{plan.preset}: {said[0]}", said[1])
            )
        return self.comparison

    def _rates(self, found: dict[str, Any], tokens: int) -> dict[str, Any]:
        rates = {way: tokens / seconds for way, seconds in found["seconds"].items()}
        return {**found, "tokens_per_s": rates, "failed": dict(self._model().failed)}

    def decode(self, cached: int) -> dict[str, Any]:
        return self._rates(self._model().decode(cached, REPETITIONS, only=self.plan.ways), 1)

    def prefill(self, tokens: int) -> dict[str, Any]:
        return self._rates(self._model().prefill(tokens, REPETITIONS, only=self.plan.ways), tokens)


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
    return {"layers": layers, "cached": cached, **found.to_dict()}


def known_ways(given: Collection[str] | None) -> tuple[str, ...]:
    """The ways asked for, all by default. Raises ValueError naming the known ones for another."""
    for way in given or ():
        if way not in compare.WAYS:
            raise ValueError(f"unknown way {way!r} to run a model; known ways: {', '.join(compare.WAYS)}")
    return compare.WAYS if given is None else tuple(w for w in compare.WAYS if w in given)
