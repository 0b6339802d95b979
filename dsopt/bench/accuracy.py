"""What a model's arithmetic costs in accuracy, on text that the model was not trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

BASE = "eager bfloat16"
# way -> how much larger than that of BASE its perplexity may be
TARGETS = {"dsopt FP8 weights": 0.005, "dsopt FP8 weights and cache": 0.01}
SAME_TOKEN = 0.95  # of the steps, with an FP8 cache beside a bfloat16 one


def windows(tokens: torch.Tensor, context: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and the tokens after them, each (batch, context) int64, that cover tokens[1:] once.

    tokens: (num_tokens,) integers. What is left at the end, less than a whole batch, is left out. Raises ValueError
    where that is everything.
    """
    count = (tokens.numel() - 1) // context // batch
    if count < 1:
        raise ValueError(f"tokens must hold more than {batch} x {context} of them, got {tokens.numel()}")
    rows = tokens[: count * batch * context + 1].long()
    shape = count, batch, context
    yield from zip(rows[:-1].view(shape), rows[1:].view(shape))


@dataclass(frozen=True)
class Prediction:
    """What a model predicted of a text.

    loss: the mean of -log p(token | those before it in its window), in nats; exp of it is perplexity.
    best: (num_tokens,) the likeliest token at each place.
    """

    loss: float
    best: torch.Tensor


@torch.no_grad()
def predict(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    context: int = 512,
    batch: int = 4,
    cache: Callable[[], Any] | None = None,
) -> Prediction:
    """Predicts a text window by window. cache: makes the cache of one window, which its attention then reads."""
    total, best = 0.0, []
    for inputs, labels in windows(tokens, context, batch):
        state = {"use_cache": False} if cache is None else {"past_key_values": cache(), "use_cache": True}
        logits = model(input_ids=inputs, **state).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        best.append(logits.argmax(-1))
    found = torch.cat(best)
    return Prediction(total / found.numel(), found)


@dataclass(frozen=True)
class Way:
    """A way to run a model: the model it is run with, and what makes its cache, if it needs one to be what it is."""

    model: torch.nn.Module
    cache: Callable[[], Any] | None = None


def ways(model: torch.nn.Module) -> Iterator[tuple[str, Way]]:
    """The ways that are compared, from a model in bfloat16; each is made when it is asked for."""
    import dsopt

    yield "eager float32", Way(copy.deepcopy(model).float())
    yield BASE, Way(model)
    yield "dsopt bfloat16", Way(dsopt.compile(model))
    narrow = copy.deepcopy(model)
    dsopt.quantize_(narrow, progress=False)
    narrow = dsopt.compile(narrow)
    yield "dsopt FP8 weights", Way(narrow)
    yield "dsopt FP8 weights and cache", Way(narrow, lambda: dsopt.LatentCache(model.config, "fp8"))


def perplexities(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    context: int = 512,
    batch: int = 4,
    step: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """One row a way: loss, perplexity, and the share of places where its likeliest token is that of BASE."""
    found = {}
    for name, way in ways(model):
        step(name)
        found[name] = predict(way.model, tokens, context, batch, way.cache)
    base = found[BASE]
    return [
        {
            "way": name,
            "loss": got.loss,
            "perplexity": math.exp(got.loss),
            "over_base": math.expm1(got.loss - base.loss),
            "same_token": (got.best == base.best).double().mean().item(),
        }
        for name, got in found.items()
    ]


@torch.no_grad()
def same_steps(model: torch.nn.Module, prompts: torch.Tensor, steps: int = 256) -> float:
    """The share of decode steps in which a model with an FP8 cache picks the token that it picks with a bfloat16 one.

    prompts: (batch, num_tokens). Both are given the prompt, then what the bfloat16 cache led to.
    """
    import dsopt

    room = prompts.shape[1] + steps
    wide, narrow = (dsopt.LatentCache(model.config, dtype, room) for dtype in ("bf16", "fp8"))
    tokens, same = prompts, 0.0
    for _ in range(steps):
        want, got = (
            model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
            for cache in (wide, narrow)
        )
        same += (want == got).double().mean().item()
        tokens = want[:, None]
    return same / steps
