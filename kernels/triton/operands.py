"""Whether the operands of a kernel belong together: a kernel on a GPU would read past the end of what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dsopt.capture import known


def refuse_operands(
    like: torch.Tensor, operands: Mapping[str, tuple[torch.Tensor | None, Sequence[int]]]
) -> str | None:
    """The reason to refuse the first operand that is not of like's dtype and device and of its wanted shape.

    operands: name -> (tensor or None, shape). Sizes that are not known to differ pass.
    """
    for name, (x, shape) in operands.items():
        if x is None:
            continue
        if (x.dtype, x.device) != (like.dtype, like.device):
            return f"needs {name} of {like.dtype} on {like.device}, got {x.dtype} on {x.device}"
        if x.ndim != len(shape) or any(known(a != b) for a, b in zip(x.shape, shape, strict=True)):
            return f"needs {name} of shape {list(shape)}, got {list(x.shape)}"
    return None
