"""Modules whose weights are kept in FP8, beside their scales.

The weights are parameters without gradients. `.to(dtype)`, `.half()` and the like neither widen them nor cast their
scales, as they would with any other floating parameter: the bytes move, between devices too, and biases are cast. What
`load_state_dict` is given for them must be in FP8, too: a wide weight would lose its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dsopt.fp8.arithmetic import check_scale
from dsopt.ops.experts import ACTIVATIONS, moe_experts
from dsopt.ops.quant import dequantize

SCALE = "_scale_inv"
BLOCK = (128, 128)
_BITS = {1: torch.uint8, 4: torch.int32}  # integers, which no conversion of a module's dtype touches


class _Quantized(nn.Module):
    """A module whose parameters are in FP8 or end in `_scale_inv`, except those that are not; see above."""

    def keep(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Registers a weight and its scale. Raises TypeError for another dtype."""
        if weight.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} must be float8_e4m3fn, got {weight.dtype}")
        if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
            raise TypeError(f"{name}{SCALE} must be float32 or float8_e8m0fnu, got {scale.dtype}")
        setattr(self, name, nn.Parameter(weight, requires_grad=False))
        setattr(self, name + SCALE, nn.Parameter(scale, requires_grad=False))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        kept = {id(p) for name, p in self._parameters.items() if p is not None and _is_kept(name, p)}

        def moved(x: torch.Tensor) -> torch.Tensor:
            if id(x) not in kept:
                return fn(x)
            bits = x.view(_BITS[x.element_size()])
            new = fn(bits)
            return new.view(x.dtype) if new.dtype == bits.dtype else x.to(new.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        wrong = []
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if parameter is None or given is None or not _is_kept(name, parameter):
                continue
            if given.dtype != parameter.dtype:
                wrong.append(f"{prefix}{name} must be {parameter.dtype}, got {given.dtype}")
        if wrong:
            error_msgs += wrong
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def _is_kept(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float8_e4m3fn or name.endswith(SCALE)


class FP8Linear(_Quantized):
    """x @ w.T + bias, w[i, j] = weight[i, j] * weight_scale_inv[i // rows, j // columns], rounded to x's dtype.

    weight (out_features, in_features), float8_e4m3fn; weight_scale_inv (ceil(out_features / rows), ceil(in_features /
    columns)), float32 or float8_e8m0fnu; bias (out_features,) or None. The tensors become the parameters as they are,
    on any device, meta included. Raises TypeError for another dtype, ValueError for shapes that do not belong together.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale_inv: torch.Tensor,
        bias: torch.Tensor | None = None,
        block: Sequence[int] = BLOCK,
    ):
        super().__init__()
        check_scale(weight, weight_scale_inv, block, "weight_scale_inv")
        if weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got shape {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must have shape [{self.out_features}], got {list(bias.shape)}")
        self.block = tuple(block)
        self.keep("weight", weight, weight_scale_inv)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize.overload(self.weight, self.weight_scale_inv, x.dtype, self.block)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        rows, columns = self.block
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={rows}x{columns}, scale={str(self.weight_scale_inv.dtype).removeprefix('torch.')}"
        )


class FP8Experts(_Quantized):
    """sum_k top_k_weights[t,k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])), e = top_k_index[t,k].

    The parameters are named as in transformers' experts of DeepSeek-V3:

    gate_up_proj (num_experts, 2 * intermediate, hidden), float8_e4m3fn: the rows of gate, then those of up
    gate_up_proj_scale_inv (num_experts, 2 * ceil(intermediate / rows), ceil(hidden / columns)): gate and up are in
        blocks of their own, as in a checkpoint that has them apart, so that no block holds rows of both
    down_proj (num_experts, hidden, intermediate), float8_e4m3fn, and down_proj_scale_inv

    activation: silu, gelu, gelu_tanh, relu or relu2; limit: as for `moe_experts`. Weights stay in FP8: none is widened
    in memory but, where no kernel reads FP8, that of one expert that was chosen at a time.
    Raises TypeError for another dtype, ValueError for shapes that do not belong together.
    """

    def __init__(
        self,
        gate_up_proj: torch.Tensor,
        gate_up_proj_scale_inv: torch.Tensor,
        down_proj: torch.Tensor,
        down_proj_scale_inv: torch.Tensor,
        activation: str = "silu",
        limit: float | None = None,
        block: Sequence[int] = BLOCK,
    ):
        super().__init__()
        if activation not in ACTIVATIONS or activation == "swiglu_oai":
            known = ", ".join(a for a in ACTIVATIONS if a != "swiglu_oai")
            raise ValueError(f"activation must be one of {known}, got {activation!r}")
        if gate_up_proj.ndim != 3 or down_proj.ndim != 3:
            got = f"{list(gate_up_proj.shape)} and {list(down_proj.shape)}"
            raise ValueError(f"gate_up_proj and down_proj must have three dimensions, got {got}")
        self.num_experts, self.hidden_dim, self.intermediate_dim = down_proj.shape
        want = (self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        if tuple(gate_up_proj.shape) != want:
            raise ValueError(
                f"gate_up_proj must have shape {list(want)} beside down_proj {list(down_proj.shape)}, "
                f"got {list(gate_up_proj.shape)}"
            )
        self.activation, self.limit, self.block = activation, limit, tuple(block)
        check_scale(down_proj, down_proj_scale_inv, block, "down_proj_scale_inv")
        blocks = -(-self.intermediate_dim // block[0])
        if gate_up_proj_scale_inv.ndim == 3 and gate_up_proj_scale_inv.shape[1] != 2 * blocks:
            got = list(gate_up_proj_scale_inv.shape)
            raise ValueError(f"gate_up_proj_scale_inv must have {2 * blocks} rows of blocks, got shape {got}")
        gate = gate_up_proj[:, : self.intermediate_dim]
        check_scale(gate, gate_up_proj_scale_inv[:, :blocks], block, "half of gate_up_proj_scale_inv")
        self.keep("gate_up_proj", gate_up_proj, gate_up_proj_scale_inv)
        self.keep("down_proj", down_proj, down_proj_scale_inv)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (..., hidden), top_k_index and top_k_weights (num_tokens, topk); of hidden_states' shape."""
        tokens = hidden_states.flatten(0, -2)
        w13, scale13 = self.gate_up_proj, self.gate_up_proj_scale_inv
        w3 = scale3 = None
        if self.intermediate_dim % self.block[0]:
            w13, w3 = w13.chunk(2, 1)
            scale13, scale3 = scale13.chunk(2, 1)
        out = moe_experts.overload(
            tokens,
            top_k_index,
            top_k_weights,
            w13,
            self.down_proj,
            w3,
            activation=self.activation,
            limit=self.limit,
            scale13=scale13,
            scale2=self.down_proj_scale_inv,
            scale3=scale3,
            block=self.block,
        )
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        rows, columns = self.block
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}, "
            f"activation={self.activation}, block={rows}x{columns}"
        )
