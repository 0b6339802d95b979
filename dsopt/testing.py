"""What tests share: seeded inputs, kernels against their op's reference, functions compiled through some passes.

`check_kernel` is for kernels of any package, third parties' included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from dsopt.capture import capture, flat, from_export, map_tensors, unflat
from dsopt.interpreter import interpreted, triton_interpreter
from dsopt.numerics import rand, relative_l2
from dsopt.op import Kernel, Op
from dsopt.ops import OPS
from dsopt.pipeline import run_pipeline
from dsopt.rewrite import Log

__all__ = [
    "LAYOUTS",
    "Rewritten",
    "check_call",
    "check_kernel",
    "check_layout",
    "check_repeats",
    "check_samples",
    "exported",
    "interpreted",
    "poisoned",
    "rand",
    "relative_l2",
    "rewritten",
    "run_kernel",
    "triton_interpreter",
    "truth",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that `torch.empty` and its kin hand out holds NaN, so that an element never written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_kernel(
    kernel: Kernel, device: torch.device | str = "cpu", dtypes: Sequence[torch.dtype] | None = None
) -> int:
    """Compares a kernel with its op's float64 reference on the op's samples; returns how many calls it took.

    dtypes: those to try; by default the kernel's own, or float32, bfloat16 and float16 if it names none.
    The samples come as they are, then in other memory layouts, then again over scratch memory that another call
    left behind. Raises AssertionError for the first call that is wrong, and if the kernel refused every sample;
    ValueError for a kernel of an unknown op.
    """
    if kernel.op not in OPS:
        raise ValueError(f"{kernel.label} is of unknown op {kernel.op!r}; known ops: {', '.join(OPS)}")
    taken = 0
    for dtype in dtypes or sorted(kernel.dtypes, key=str) or DTYPES:
        taken += check_samples(kernel, device, dtype)
        taken += sum(check_layout(kernel, device, dtype, change) for change in LAYOUTS)
        check_repeats(kernel, device, dtype)
    if not taken:
        refusals = {
            kernel.refuses(args): None for dtype in DTYPES for args in _samples(kernel, device, dtype)
        }
        raise AssertionError(f"{kernel.label} refused every sample: {'; '.join(map(str, refusals))}")
    return taken


def check_samples(
    kernel: Kernel, device: torch.device | str, dtype: torch.dtype, largest: int | None = None
) -> int:
    """`check_call` on every sample of the kernel's op; the number of calls that were not refused.

    largest: leaves out samples of more elements than that, for kernels that are slow where they are tried.
    """
    samples = _samples(kernel, device, dtype)
    if largest is not None:
        samples = [args for args in samples if sum(x.numel() for x in _tensors(args)) <= largest]
    return sum(check_call(kernel, args) for args in samples)


def check_layout(
    kernel: Kernel,
    device: torch.device | str,
    dtype: torch.dtype,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> int:
    """`check_call` on samples whose tensors are laid out otherwise, each alone and all; the number not refused.

    change: one of LAYOUTS. Every other sample, small ones only: what matters here is the layout.
    """
    samples = [
        args for args in _samples(kernel, device, dtype) if sum(x.numel() for x in _tensors(args)) < 6_000
    ]
    return sum(check_call(kernel, other) for args in samples[::2] for other in _variants(args, change))


def check_repeats(kernel: Kernel, device: torch.device | str, dtype: torch.dtype) -> None:
    """Raises AssertionError if a result depends on what another call left in scratch memory, be it by a bit."""
    samples = [a for a in _samples(kernel, device, dtype) if kernel.refuses(a) is None][:4]
    first = [run_kernel(kernel, args) for args in samples]
    for args, old in reversed(list(zip(samples, first, strict=True))):
        for x, y in zip(run_kernel(kernel, args), old, strict=True):
            if not torch.equal(_bits(x), _bits(y)):
                _fail(kernel, args, "gives another result after other calls")


def check_call(kernel: Kernel, args: tuple) -> bool:
    """Compares one call with the truth; False if the kernel refuses it. Raises AssertionError naming what is wrong.

    The results must have the reference's shapes and dtypes, be contiguous, share no memory with the arguments,
    and be as near to the reference in float64 as the op's tolerance says; the arguments must stay as they are.
    """
    op = OPS[kernel.op]
    args = op.bind(args)
    if kernel.refuses(args) is not None:
        return False
    tensors = _tensors(args)
    got, want, like = run_kernel(kernel, args), truth(op, args), flat(op.reference(*args))
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    if len(got) != len(like):
        _fail(kernel, args, f"gives {len(got)} results, not {len(like)}")
    for a, b in zip(got, like, strict=True):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, tensors[0].device):
            _fail(
                kernel, args, f"gives {_describe(a)} on {a.device}, not {_describe(b)} on {tensors[0].device}"
            )
        if not a.is_contiguous():
            _fail(kernel, args, f"gives a result of strides {a.stride()}, which is not contiguous")
        if a.numel() and a.untyped_storage().data_ptr() in storages:
            _fail(kernel, args, "gives a view of an argument")
    error, allowed = op.error(args, got, want), op.tolerance[tensors[0].dtype]
    if not error <= allowed:
        _fail(kernel, args, f"is off by {error:.2e} > {allowed:.0e}")
    return True


def run_kernel(kernel: Kernel, args: tuple) -> list[torch.Tensor]:
    """The kernel's results over memory that held NaN. Raises AssertionError if it changes an argument."""
    before = [x.detach().clone() for x in _tensors(args)]
    with poisoned(), torch.no_grad():
        out = flat(kernel.plan(*args)(*args))
    if not all(torch.equal(_bits(x), _bits(y)) for x, y in zip(before, _tensors(args), strict=True)):
        _fail(kernel, args, "changes an argument")
    return out


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same bits as bytes: NaN differs from itself as a number."""
    return x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def truth(op: Op, args: tuple) -> list[torch.Tensor]:
    """The results of an op's reference in float64."""
    return flat(op.reference(*map_tensors(lambda x: x.double() if x.is_floating_point() else x, args)))


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values one element into a storage, so that no vector load of them is aligned."""
    if x.numel() == 0:
        return x
    storage = x.new_empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


def _last_dim_strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, torch.full_like(x, 1)), -1)[..., 0] if x.ndim else x


def _first_dim_inside(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim > 1 else x


def _padded_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x[..., :3]), -1)[..., : x.shape[-1]] if x.ndim else x


LAYOUTS = (_unaligned, _last_dim_strided, _first_dim_inside, _padded_rows)


def _samples(kernel: Kernel, device: torch.device | str, dtype: torch.dtype) -> list[tuple]:
    op = OPS[kernel.op]
    return [op.bind(args) for args in op.samples(torch.device(device), dtype)]


def _tensors(args: tuple) -> list[torch.Tensor]:
    return [x for x in flat(args) if isinstance(x, torch.Tensor)]


def _variants(args: tuple, change: Callable) -> Iterator[tuple]:
    """The arguments with `change` made to each tensor alone, then to all."""
    for chosen in [[x] for x in _tensors(args)] + [_tensors(args)]:
        yield map_tensors(lambda x, chosen=chosen: change(x) if any(x is c for c in chosen) else x, args)


def _describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)


def _fail(kernel: Kernel, args: tuple, what: str) -> None:
    raise AssertionError(f"{kernel.label} {what}, for arguments {', '.join(map(_describe, flat(args)))}")


@dataclass
class Rewritten:
    """A function as some passes left it. graphs and logs gain an entry at each (re)compilation."""

    graphs: list[GraphModule] = field(default_factory=list)
    logs: list[list[Log]] = field(default_factory=list)
    run: Callable[..., Any] = None

    def log(self, name: str) -> Log:
        """What the pass of that name did to the newest graph."""
        return next(log for log in self.logs[-1] if log.name == name)

    def ops(self) -> list[str]:
        """The calls of the newest graph in order, such as `aten.linear`; arithmetic on sizes is left out."""
        targets = [n.target for n in self.graphs[-1].graph.nodes if n.op == "call_function"]
        return [str(t.overloadpacket) for t in targets if hasattr(t, "overloadpacket")]

    def count(self, op: str) -> int:
        return self.ops().count(op)


def rewritten(
    fn: Callable, *args: Any, passes: Sequence[str] | None = None, dynamic: bool | None = None
) -> Rewritten:
    """`fn` as one Dynamo graph that goes through `passes` (all by default) and then runs as it is."""
    result = Rewritten()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        graph = capture(gm, example_inputs)
        result.logs.append(run_pipeline(graph, passes))
        result.graphs.append(graph)
        return graph.forward

    result.run = torch.no_grad()(torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True))
    result.run(*args)
    return result


def exported(model: torch.nn.Module, *args: Any, passes: Sequence[str] | None = None) -> Rewritten:
    """`model` through torch.export and `passes`; its `run` takes the same arguments."""
    with torch.no_grad():
        program = torch.export.export(model, args)
    graph = from_export(program)
    result = Rewritten([graph], [run_pipeline(graph, passes)])
    signature = program.graph_signature
    lifted = (*signature.parameters, *signature.buffers, *signature.lifted_tensor_constants)
    state = [program.state_dict.get(name, program.constants.get(name)) for name in lifted]

    def run(*args: Any) -> Any:
        with torch.no_grad():
            out = graph(*state, *flat(args))
        return unflat(program, out)

    result.run = run
    return result
