"""What a model's arithmetic costs in accuracy, on text that the model was not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


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


@torch.inference_mode()
def loss(model: torch.nn.Module, tokens: torch.Tensor, context: int = 512, batch: int = 4) -> float:
    """The mean of -log p(token | those before it in its window), in nats; exp of it is perplexity."""
    total = count = 0.0
    for inputs, labels in windows(tokens, context, batch):
        logits = model(input_ids=inputs, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
        count += labels.numel()
    return total / count
