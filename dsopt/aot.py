"""Compiles the Triton kernels of the tree for GPUs that need not be there, and counts what they use.

`python -m dsopt.aot` plans and calls each kernel of `kernels/triton` with tensors that have no memory; what would be
launched is compiled instead, by the same code that compiles it on a GPU. A module there names the calls in
`ahead_of_time(tensor)`, which yields tuples of its op's arguments and gets a function of sizes and a dtype that makes
tensors. A kernel that spills registers fails under Triton 3.6; other versions, whose register allocation differs,
only report.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dsopt import terminal
from dsopt.gpu import Capability, imitate
from dsopt.interpreter import replacer
from dsopt.op import Kernel, kernels
from dsopt.ops import OPS
from dsopt.progress import Steps

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
BACKEND = "triton"
GATE = "3.6"  # the version under which a spill is a failure
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Compiled:
    """What one launched function uses on one GPU. spills: instructions that read or write local memory."""

    op: str
    kernel: str
    constants: str
    num_warps: int
    num_stages: int
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def triton_kernels(ops: Sequence[str] = ()) -> list[Kernel]:
    """All Triton kernels, or those of some ops. ImportError for one whose module cannot be imported."""
    found = []
    for op in ops or OPS:
        known, broken = kernels(op)
        for refusal in broken:
            if refusal.kernel.startswith(f"{BACKEND}."):
                raise ImportError(f"{refusal.kernel}: {refusal.reason}")
        found += [k for k in known if k.backend == BACKEND]
    return found


def calls_of(kernel: Kernel) -> Callable[[Callable[..., torch.Tensor]], Iterator[tuple]]:
    """`ahead_of_time` of the module that a kernel is from. ValueError where it has none."""
    module = sys.modules[kernel.plan.__module__]
    if not hasattr(module, "ahead_of_time"):
        raise ValueError(f"{module.__name__} needs ahead_of_time(tensor), the calls it is compiled for")
    return module.ahead_of_time


@contextlib.contextmanager
def compiling(capability: Capability) -> Iterator[list[Any]]:
    """While it is open, Triton kernels are compiled for a capability instead of launched; the list grows by each."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    arch = 10 * capability[0] + capability[1]

    class Driver:
        """What Triton asks a GPU's driver before it compiles."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return f"sm_{arch}"

        def get_current_stream(self, device):
            return 0

    found: list[Any] = []

    def run(original):
        def compile_only(self, *args, grid, warmup, **kwargs):
            found.append(original(self, *args, grid=grid, warmup=True, **kwargs))

        return compile_only

    with contextlib.ExitStack() as stack:
        stack.enter_context(imitate(capability))
        replace = replacer(stack)
        replace(jit.driver, "_active", lambda _: Driver())
        replace(jit.JITFunction, "run", run)
        yield found


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that has a shape, strides and a dtype but no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_kernel(kernel: Kernel, capability: Capability, most: int | None = None) -> list[Compiled]:
    """Everything that a kernel launches in its calls, or the first `most` of them; each variant once.

    Raises ValueError for a call that the kernel refuses, and for a module without `ahead_of_time`.
    """
    with compiling(capability) as found:
        for args in itertools.islice(calls_of(kernel)(tensor), most):
            bound = OPS[kernel.op].bind(args)
            if reason := kernel.check(*bound):
                raise ValueError(f"{kernel.label} refuses a call that is to be compiled: {reason}")
            kernel.plan(*bound)(*bound)
    return [_measure(kernel.op, variant) for variant in {c.hash: c for c in found}.values()]


def _measure(op: str, compiled: Any) -> Compiled:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    names = compiled.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items()}
    return Compiled(
        op,
        compiled.src.fn.__name__,
        ", ".join(f"{k}={v}" for k, v in constants.items() if k.isupper()),
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        f"sm_{compiled.metadata.target.arch}",
        registers,
        stack,
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        compiled.metadata.shared,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(rows: list[Compiled]) -> Table:
    """One line a compiled kernel; spills are red."""
    drawn = Table("op", "kernel", "constants", "warps", "stages", "arch", "registers", "spills", "shared")
    for row in rows:
        spills = f"[red]{row.spills}[/]" if row.spills else "0"
        drawn.add_row(
            row.op,
            row.kernel,
            row.constants,
            str(row.num_warps),
            str(row.num_stages),
            row.arch,
            str(row.registers),
            spills,
            f"{row.shared / 1024:.0f} KB",
        )
    return drawn


@app.command()
def main(
    op: Annotated[list[str] | None, typer.Option(help="Ops to compile; all by default.")] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capabilities; 80, 90, 100 by default.")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the figures as JSON to FILE; - is standard output."
        ),
    ] = None,
) -> None:
    """Compile every Triton kernel of the tree for GPUs that need not be there; fails where registers spill."""
    import triton

    if unknown := set(op or ()) - OPS.keys():
        raise terminal.fail(f"unknown op {', '.join(sorted(unknown))}; known ops: {', '.join(OPS)}")
    console = terminal.console(json_file)
    wanted = [divmod(a, 10) for a in arch] if arch else CAPABILITIES
    found = triton_kernels(op or ())
    rows = []
    with Steps(terminal.console("-")) as step:
        step.expect(len(found) * len(wanted))
        for kernel in found:
            for capability in wanted:
                step(kernel.label, f"sm_{capability[0]}{capability[1]}")
                rows += compile_kernel(kernel, capability)
                step.advance()
    console.print(table(rows))
    terminal.write({"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}, json_file)
    spilled = [r for r in rows if r.spills]
    gated = triton.__version__.startswith(f"{GATE}.")
    console.print(f"{len(rows)} kernels under Triton {triton.__version__}, {len(spilled)} spill registers")
    if spilled and not gated:
        console.print(f"Spills fail under Triton {GATE} only.")
    raise typer.Exit(1 if spilled and gated else 0)


if __name__ == "__main__":
    app()
