"""The command `dsopt`: demo, env, compile, verify, bench. What only one of them needs loads inside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsopt.bench.command import bench
from dsopt.terminal import console as _console
from dsopt.terminal import fail as _fail
from dsopt.terminal import write as _write

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Kernel and graph optimizer for DeepSeek models."
)

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON to FILE; - is standard output."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A preset (v2-lite, v3, ...), a transformers model type, or a folder with config.json."
    ),
]
Tiny = Annotated[bool, typer.Option(help="Shrink every width to a test's size.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Number of layers, instead of the config's.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Weights = Annotated[bool, typer.Option(help="Load the folder's weights instead of random ones.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
Decode = Annotated[int, typer.Option(min=1, help="Decode steps after it.")]
FP8 = Annotated[bool, typer.Option("--fp8", help="Quantize the weights to FP8 blocks first.")]
Kernels = Annotated[
    list[str] | None,
    typer.Option(metavar="OP=BACKEND", help="Try this backend first for this op (repeatable)."),
]
VARIABLES = {
    "DSOPT_DISABLE": "backends not to use, separated by commas",
    "DSOPT_ISA": "instruction set of the native CPU kernels, instead of the best one",
    "DSOPT_CACHE": "0: do not keep what was made of graphs for other processes",
    "DSOPT_CACHE_DIR": "folder where that is kept, instead of the user's cache",
    "DSOPT_DUMP": "folder for the graph after each pass",
    "DSOPT_FUEL": "stop after so many rewrites, to find a wrong one by bisection",
}


def main() -> None:
    """Runs the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import dsopt

        print(dsopt.__version__)
        raise typer.Exit


def _need_transformers(at_least: tuple[int, int]) -> None:
    try:
        import transformers
    except ImportError as error:
        raise _fail("this needs transformers: pip install 'dsopt\\[hf]'") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < at_least:
        wanted = ".".join(map(str, at_least))
        raise _fail(f"this needs transformers >= {wanted}, not {transformers.__version__}")


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option(help="V2-Lite at 3 layers only, without the slowest figures.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="At most so many layers a model.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, instead of PyTorch's choice.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="A small trained model completes Python source instead.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="What --generate completes.")] = None,
    new_tokens: Annotated[int, typer.Option(min=3, help="How many bytes --generate adds.")] = 200,
    json_file: Json = None,
) -> None:
    """DeepSeek geometry with random weights in eager, Inductor and dsopt, beside dsopt's targets."""
    _need_transformers((5, 23))
    import torch

    from dsopt import complete
    from dsopt import demo as show

    if threads is not None:
        torch.set_num_threads(threads)
    if generate:
        given = complete.PROMPT if prompt is None else prompt
        result = complete.show(_console(json_file), given, new_tokens)
    else:
        result = show.show(_console(json_file), quick, layers)
    _write(result, json_file)
    if result.get("interrupted"):
        raise typer.Exit(130)


@app.command()
def env(json_file: Json = None) -> None:
    """This machine, the versions on it, and which kernel each op gets here."""
    from dsopt import graphcache, machine

    description = machine.describe()
    description["isa"] = _isa()
    kept = graphcache.files()
    description["graph_cache"] = {
        "folder": None if (place := graphcache.folder()) is None else str(place),
        "graphs": len(kept),
        "bytes": sum(size for _, size, _ in kept),
    }
    try:
        description["kernels"] = _kernels()
    except ValueError as error:  # a misspelt DSOPT_DISABLE, or two kernels of one name
        raise _fail(str(error)) from error
    description["environment"] = {name: os.environ.get(name) for name in VARIABLES}
    _write(description, json_file)
    if json_file == "-":
        return
    console = _console(json_file)
    cpu, memory = description["cpu"], description["memory"]
    facts = Table(title="Machine", title_justify="left", show_header=False)
    facts.add_row("system", description["system"])
    facts.add_row("processor", f"{cpu['model']} ({cpu['architecture']})")
    facts.add_row("instruction sets", " ".join(cpu["flags"]) or "unknown")
    facts.add_row("native kernels", description["isa"])
    facts.add_row("threads", f"{description['threads']} of {cpu['processors']} processors")
    if memory["total"]:
        facts.add_row(
            "memory", f"{memory['available'] / 2**30:.1f} of {memory['total'] / 2**30:.1f} GiB free"
        )
    cache = description["graph_cache"]
    facts.add_row(
        "graph cache",
        f"{cache['folder']}: {cache['graphs']} graphs, {cache['bytes'] / 2**20:.1f} MiB"
        if cache["folder"]
        else "off",
    )
    gpus = [f"{g['name']}, {g['memory'] / 2**30:.0f} GiB, {g['arch']}" for g in description["gpus"]]
    facts.add_row("GPUs", "\n".join(gpus) or "none that PyTorch can use")
    facts.add_row("versions", "\n".join(f"{k} {v or '-'}" for k, v in description["versions"].items()))
    console.print(facts)

    dtypes = sorted({row["dtype"] for row in description["kernels"]}, reverse=True)
    table = Table(
        title="Kernels, in the order they are tried on each op's sample inputs", title_justify="left"
    )
    for column in ("device", "kernel", *dtypes):
        table.add_column(column, overflow="fold")
    verdicts: dict[tuple[str, str], dict[str, str]] = {}
    for row in description["kernels"]:
        verdicts.setdefault((row["device"], row["kernel"]), {})[row["dtype"]] = row["verdict"]
    for (device, kernel), by_dtype in verdicts.items():
        # the reference, which takes everything, is the last of its op
        last = kernel.startswith("reference.")
        table.add_row(device, kernel, *(by_dtype.get(dtype, "") for dtype in dtypes), end_section=last)
    console.print(table)

    variables = Table(title="Environment variables", title_justify="left")
    for column in ("variable", "set to", "meaning"):
        variables.add_column(column)
    for name, meaning in VARIABLES.items():
        variables.add_row(name, description["environment"][name] or "-", meaning)
    console.print(variables)


def _isa() -> str:
    try:
        import torch  # its OpenMP runtime must be there before the extension asks for one

        from dsopt import _cpu

        of_torch = torch.backends.cpu.get_cpu_capability()
        return f"{_cpu.isa()} (of {', '.join(_cpu.isas())}; PyTorch uses {of_torch})"
    except (ImportError, ValueError) as error:
        return f"none: {error}"


def _kernels() -> list[dict[str, Any]]:
    """For each op, device and dtype, what each kernel says to the op's sample inputs."""
    import torch

    from dsopt.op import disabled_backends, explain
    from dsopt.ops import OPS

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    disabled = disabled_backends()
    rows = []
    for op in OPS.values():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                verdicts: dict[str, list[str]] = {}
                for sample in op.samples(torch.device(device), dtype):
                    for kernel, verdict in explain(op, *sample):
                        verdicts.setdefault(kernel, []).append(verdict)
                for kernel, given in verdicts.items():
                    refusals = [v for v in given if v != "accepts"]
                    off = kernel.split(".")[0] in disabled
                    rows.append(
                        {
                            "op": op.name,
                            "device": device,
                            "dtype": str(dtype).removeprefix("torch."),
                            "kernel": kernel,
                            "accepts": 0 if off else len(given) - len(refusals),
                            "samples": len(given),
                            "verdict": "disabled by DSOPT_DISABLE" if off else _verdict(len(given), refusals),
                        }
                    )
    return rows


def _verdict(samples: int, refusals: list[str]) -> str:
    if not refusals:
        return "accepts"
    if len(refusals) == samples:
        return refusals[0]
    return f"accepts {samples - len(refusals)} of {samples}, else: {refusals[0]}"


def _request(
    model: str,
    tiny: bool,
    layers: int | None,
    dtype: str,
    weights: bool,
    tokens: int,
    steps: int,
    kernel: list[str] | None,
    fp8: bool,
) -> Any:
    """The `dsopt.trial.Request` of a command's options."""
    _need_transformers((5, 17))
    from dsopt.trial import Request

    if wrong := [item for item in kernel or [] if not all(item.partition("="))]:
        raise _fail(f"--kernel takes OP=BACKEND, such as rms_norm=torch, got {wrong[0]!r}")
    chosen = dict(item.partition("=")[::2] for item in kernel or [])
    return Request(model, tiny, layers, dtype, weights, tokens, steps, chosen, fp8)


def _try(what: Callable, request: Any, console: Console) -> tuple[dict[str, Any], Any]:
    """A function of `dsopt.trial` on a request, with its progress shown and its errors told."""
    from dsopt.progress import Steps

    try:
        with Steps(console) as step:
            return what(request, step)
    except (ValueError, OSError, MemoryError) as error:
        raise _fail(str(error)) from error


@app.command()
def compile(
    model: Model,
    tiny: Tiny = False,
    layers: Layers = None,
    dtype: Dtype = "bfloat16",
    weights: Weights = False,
    tokens: Tokens = 32,
    steps: Decode = 3,
    kernel: Kernels = None,
    fp8: FP8 = False,
    explain: Annotated[
        bool, typer.Option(help="Say module by module what was fused, and what was not and why.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Compile a model, run a prefill and decode steps, and print what dsopt did to it."""
    request = _request(model, tiny, layers, dtype, weights, tokens, steps, kernel, fp8)
    from dsopt import trial

    console = _console(json_file)
    figures, report = _try(trial.run, request, console)
    seconds = figures["seconds"]
    decode = ", ".join(f"{taken:.3f}" for taken in seconds["decode"])
    console.print(
        f"{model}, {figures['layers']} layers: prompt of {tokens} {seconds['prompt']:.2f} s with compiling; "
        f"decode steps {decode} s, the first with compiling",
        highlight=False,
    )
    console.print(report)
    if explain:
        console.print(report.explain())
        figures["explain"] = report.explain().to_dict()
    _write(figures, json_file)


@app.command()
def verify(
    model: Model,
    tiny: Tiny = False,
    layers: Layers = None,
    dtype: Dtype = "bfloat16",
    weights: Weights = False,
    tokens: Tokens = 32,
    steps: Decode = 1,
    kernel: Kernels = None,
    fp8: FP8 = False,
    json_file: Json = None,
) -> None:
    """Compare each rewritten site of a model with eager, on a prefill and decode steps; exit 1 if one departs."""
    request = _request(model, tiny, layers, dtype, weights, tokens, steps, kernel, fp8)
    from dsopt import trial

    console = _console(json_file)
    figures, results = _try(trial.verify, request, console)
    for name, result in results.items():
        console.print(f"\n{name}", result, sep="\n", highlight=False)
    _write(figures, json_file)
    if any(result.first for result in results.values()):
        raise typer.Exit(1)


app.command()(bench)
