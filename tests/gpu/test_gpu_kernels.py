"""Every kernel that accepts tensors on a GPU against its op's float64 reference there; nothing here names one."""

import pytest
import torch

from dsopt.capture import flat, map_tensors
from dsopt.op import kernels
from dsopt.ops import OPS
from dsopt.testing import LAYOUTS, check_call, check_layout, check_repeats, truth

CUDA = torch.device("cuda")
FAR = 2**31  # elements
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {k.label: k for name in OPS for k in kernels(name)[0] if k.device in (None, "cuda")}
TRITON = {label: k for label, k in KERNELS.items() if k.backend == "triton"}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_triton = pytest.mark.parametrize("kernel", TRITON.values(), ids=TRITON)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """The same values in a new random order, as far apart in memory as they were."""
    if not x.is_floating_point() or 0 in x.stride():
        return x
    values = x.reshape(-1)[torch.randperm(x.numel(), device=x.device)].view(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(values)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, but the last of dimension 0 FAR elements from the first: offsets do not fit into 32 bits."""
    if x.ndim < 2 or not 2 <= x.shape[0] <= 64:
        return x
    strides = (FAR // (x.shape[0] - 1) // 16 * 16 + 16, *x.contiguous().stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def tensors(args) -> list[torch.Tensor]:
    return [x for x in flat(args) if isinstance(x, torch.Tensor)]


def samples(kernel, dtype):
    """Samples that a kernel takes, with fresh values."""
    op = OPS[kernel.op]
    every = [op.bind(map_tensors(shuffled, args)) for args in op.samples(CUDA, dtype)]
    taken = [args for args in every if kernel.refuses(args) is None]
    if not taken:
        assert kernel.dtypes and dtype not in kernel.dtypes, f"refused: {kernel.refuses(every[0])}"
        pytest.skip(kernel.refuses(every[0]))
    return taken


@each_dtype
@each_kernel
def test_samples(kernel, dtype):
    for args in samples(kernel, dtype):
        assert check_call(kernel, args)


@pytest.mark.parametrize("change", LAYOUTS, ids=lambda f: f.__name__)
@each_triton
def test_memory_layouts(kernel, change):
    assert check_layout(kernel, CUDA, torch.bfloat16, change)


@each_triton
def test_results_do_not_depend_on_the_call_before(kernel):
    check_repeats(kernel, CUDA, torch.bfloat16)


@each_triton
def test_offsets_beyond_32_bits(kernel):
    """Each tensor alone: one is 4 GB large."""
    tried = 0
    for args in samples(kernel, torch.bfloat16)[:6]:
        for one in tensors(args):
            wide = map_tensors(lambda x, one=one: far_apart(x) if x is one else x, args)
            if any(stride > FAR // 128 for x in tensors(wide) for stride in x.stride()):
                tried += check_call(kernel, wide)
    assert tried


@each_triton
def test_nothing_waits_for_the_gpu_and_a_graph_replays(kernel):
    """A planned call asks the GPU for nothing, and a CUDA graph of it computes what new values in its inputs say."""
    args = max(samples(kernel, torch.bfloat16), key=lambda args: max(x.numel() for x in tensors(args)))
    fn = kernel.plan(*args)
    with torch.no_grad():
        fn(*args)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fn(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flat(fn(*args))
        for x in tensors(args):
            if (other := shuffled(x)) is not x:
                x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
    op = OPS[kernel.op]
    assert op.error(args, out, truth(op, args)) <= op.tolerance[torch.bfloat16]
