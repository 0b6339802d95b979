"""Gradients of the ops, recomputed through their references.

Training speed is not what the ops are for; right gradients are, for whoever calls one in code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_TENSOR = object()  # stands for a tensor in the layout of an argument list


def register(qualname: str, reference: Callable, library: torch.library.Library) -> None:
    """Gives the operator `qualname` the gradient of `reference`, which takes the same arguments.

    PyTorch hands no gradients to a list that holds None beside tensors; asking for them raises
    NotImplementedError.
    """

    def backward(ctx, *grads):
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = reference(*_fill(ctx.layout, iter(leaves)))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        grads = grads[0] if isinstance(grads[0], (tuple, list)) else grads
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        found = {}
        if pairs and wanted:
            roots, seeds = zip(*pairs, strict=True)
            got = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
            found = {id(x): g for x, g in zip(wanted, got, strict=True)}
        filled = _fill(ctx.layout, iter([found.get(id(x)) for x in leaves]))
        given = len(ctx.needs_input_grad)  # defaults that the caller left out are not among the inputs
        slots = zip(filled, ctx.layout, strict=True)
        return tuple(g if _is_all_tensors(slot) else None for g, slot in slots)[:given]

    torch.library.register_autograd(qualname, backward, setup_context=_save, lib=library)


def _save(ctx, inputs: Sequence[Any], output: Any) -> None:
    ctx.layout = [
        [_TENSOR if isinstance(y, torch.Tensor) else y for y in x]
        if isinstance(x, (list, tuple))
        else (_TENSOR if isinstance(x, torch.Tensor) else x)
        for x in inputs
    ]
    for slot, x in zip(ctx.layout, inputs, strict=True):
        mixed = isinstance(slot, list) and _TENSOR in slot and not _is_all_tensors(slot)
        if mixed and any(isinstance(y, torch.Tensor) and y.requires_grad for y in x):
            raise NotImplementedError(
                "gradients for a list of tensors need a tensor in each place, found None"
            )
    flat = (y for x in inputs for y in (x if isinstance(x, (list, tuple)) else [x]))
    ctx.save_for_backward(*(y for y in flat if isinstance(y, torch.Tensor)))


def _is_all_tensors(slot: Any) -> bool:
    return slot is _TENSOR or (isinstance(slot, list) and bool(slot) and all(y is _TENSOR for y in slot))


def _fill(layout: Sequence[Any], values: Iterator[Any]) -> list[Any]:
    """The layout with the values in its tensors' places, in order."""
    return [
        [next(values) if y is _TENSOR else y for y in slot]
        if isinstance(slot, list)
        else (next(values) if slot is _TENSOR else slot)
        for slot in layout
    ]
