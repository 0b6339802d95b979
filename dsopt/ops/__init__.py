"""Every `dsopt::` op. `OPS` maps the op's name to its record; a new op is one `Op` and one word here."""

from dsopt.op import Op
from dsopt.ops.attention import attention, mla_attention
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import gated_mlp, multi_linear
from dsopt.ops.norm import add_rms_norm, rms_norm
from dsopt.ops.quant import dequantize
from dsopt.ops.rope import rope
from dsopt.ops.route import moe_route

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        rms_norm,
        add_rms_norm,
        rope,
        multi_linear,
        gated_mlp,
        attention,
        mla_attention,
        moe_route,
        moe_experts,
        dequantize,
    )
}
