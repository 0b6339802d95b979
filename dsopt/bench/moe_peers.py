"""The experts of other packages on a case's weights, where they are installed: zentorch and kt-kernel, both on CPUs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch

from dsopt.bench.absent import Absent
from dsopt.bench.cases import Case

_LONGEST = 4096  # tokens that kt-kernel is told to expect


def zentorch_experts(case: Case, args: tuple) -> Callable:
    """AMD's `zentorch_fused_moe`, which keeps a packed copy of the weights."""
    # its default kernel of grouped products gives wrong results on dense random data (zentorch 2.13.0.2)
    os.environ.setdefault("ZENDNNL_GRP_MATMUL_CUSTOM_KERNEL", "0")
    try:
        importlib.import_module("zentorch")  # which registers the operator
    except ImportError as error:
        raise Absent(f"zentorch is not installed: {error}") from error
    x, _, _, w13, w2 = args[:5]
    if x.dtype != torch.bfloat16 or not x.is_cpu:
        raise Absent("it takes bfloat16 on the CPU")

    def fn(x, ids, weights, *_):
        out = torch.empty_like(x)
        ids, weights = ids.to(torch.int32).contiguous(), weights.contiguous()
        torch.ops.zentorch.zentorch_fused_moe(out, x, w13, w2, None, None, weights, ids, False, "silu")
        return out

    return fn


def kt_experts(kind: str) -> Callable[[Case, tuple], Callable]:
    """kt-kernel's `AMXBF16_MOE` (AVX-512 where there is no AMX) or `AVX2BF16_MOE`, on a copy of the weights."""

    def build(case: Case, args: tuple) -> Callable:
        try:
            from kt_kernel import kt_kernel_ext as kt
        except ImportError as error:
            raise Absent(f"kt-kernel is not installed: {error}") from error
        x, ids, _, w13, w2 = args[:5]
        if x.dtype != torch.bfloat16 or not x.is_cpu:
            raise Absent("it takes bfloat16 on the CPU")
        experts, hidden, inner = w2.shape
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [torch.get_num_threads()]
        workers = kt.CPUInfer(pool)
        nobody = torch.zeros(experts, dtype=torch.bool)  # experts that a GPU has
        config = kt.moe.MOEConfig(experts, ids.shape[1], hidden, inner, nobody.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, workers.backend_, _LONGEST
        halves = w13[:, :inner], w13[:, inner:], w2
        config.gate_projs, config.up_projs, config.down_projs = (
            [[w[i].data_ptr() for i in range(experts)]] for w in halves
        )
        config.gate_scales = config.up_scales = config.down_scales = [[0] * experts]
        experts_of = getattr(kt.moe, kind)(config)
        order = torch.arange(experts)
        workers.submit(experts_of.load_weights_task(order.data_ptr()))
        workers.sync()

        def fn(x, ids, weights, *_):
            x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
            out, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
            addresses = [t.data_ptr() for t in (ids, weights, x, out)]
            workers.submit(experts_of.forward_task(count.data_ptr(), ids.shape[1], *addresses, False))
            workers.sync()
            return out

        fn.kept = nobody, order
        return fn

    return build
