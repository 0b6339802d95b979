"""The command line of the benchmarks: `dsopt bench`, `benchmarks/run.py` and one script for each family of ops."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dsopt import terminal

RESULTS = Path("benchmarks/results")
AUTO = "auto"

Ops = Annotated[str | None, typer.Option("--op", help="Ops, separated by commas; model for whole models.")]
Model = Annotated[
    str, typer.Option("--model", metavar="PRESET", help="Geometry: presets, separated by commas.")
]
Backend = Annotated[
    str | None, typer.Option(help="Backends whose kernels are measured, such as cpu,torch; all by default.")
]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baseline", help="reference, eager, inductor, peers; or none. For model: eager,inductor,dsopt."
    ),
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16, separated by commas.")]
Tokens = Annotated[str | None, typer.Option(help="New tokens of a sequence; for model the prompts' lengths.")]
Context = Annotated[
    str | None, typer.Option(help="Tokens that attention sees; for model those in the cache.")
]
Batch = Annotated[str | None, typer.Option(help="Numbers of sequences.")]
Threads = Annotated[str | None, typer.Option(help="Numbers of threads; PyTorch's choice by default.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one, by default.")]
Layers = Annotated[str | None, typer.Option(help="Numbers of layers of whole models; 3 by default.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="How long the ways of one case take turns.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes and next to no repetitions: shows that it runs.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help=f"Write the result; - is standard output, auto a dated file in {RESULTS}.",
    ),
]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Draw the roofline as PNG.")]
Compare = Annotated[str | None, typer.Option(metavar="FILE", help="Show ratios to an older result.")]
Resume = Annotated[bool, typer.Option(help="Go on where the result in the --json file ends.")]


def bench(
    op: Ops = None,
    model: Model = "v2-lite",
    backend: Backend = None,
    baseline: Baselines = None,
    dtype: Dtype = "bfloat16",
    tokens: Tokens = None,
    context: Context = None,
    batch: Batch = None,
    threads: Threads = None,
    device: Device = None,
    layers: Layers = None,
    seconds: Seconds = 3.0,
    quick: Quick = False,
    json_file: Json = None,
    plot: Plot = None,
    compare: Compare = None,
    resume: Resume = False,
) -> None:
    """Measure kernels beside PyTorch, Inductor and installed peers, and against this machine's measured ceilings."""
    import torch

    from dsopt.bench import session
    from dsopt.ops import OPS

    _check_files(json_file, plot, compare, resume)
    json_file = auto_name(op) if json_file == AUTO else json_file
    try:
        request = session.Request(
            ops=_names(op) or tuple(OPS),
            presets=_names(model) or (),
            backends=_names(backend),
            baselines=() if baseline == "none" else _names(baseline),
            dtypes=_names(dtype) or (),
            tokens=_numbers("tokens", tokens),
            context=_numbers("context", context),
            batch=_numbers("batch", batch),
            threads=_numbers("threads", threads),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            layers=_numbers("layers", layers),
            quick=quick,
            seconds=seconds,
        )
        old = None if compare is None else session.read_document(compare)
        again = resume and Path(json_file).exists()
        document = session.read_document(json_file) if again else session.new_document()
    except (ValueError, OSError) as error:
        raise terminal.fail(str(error)) from error
    interrupted = _run(request, document, json_file)
    _show(document, old, plot, json_file)
    if interrupted:
        raise typer.Exit(130)
    if any(problem["what"] == "wrong" for problem in document["problems"]):
        raise typer.Exit(1)


def _run(request: Any, document: dict[str, Any], json_file: str | None) -> bool:
    """Runs what was asked for; True if Ctrl-C ended it."""
    from dsopt.bench import session
    from dsopt.compare import quiet
    from dsopt.progress import Steps

    if session.MODEL in request.ops:
        quiet()
    file = None if json_file == "-" else json_file
    document.pop("interrupted", None)
    try:
        with Steps(terminal.console("-")) as step:
            session.run(request, document, step, lambda: terminal.write(document, file))
    except KeyboardInterrupt:
        document["interrupted"] = True
        terminal.write(document, file)
    return document.get("interrupted", False)


def _show(
    document: dict[str, Any], old: dict[str, Any] | None, plot: str | None, json_file: str | None
) -> None:
    from dsopt.bench import changes, roofline, table

    out = terminal.console(json_file)
    out.print(_machine_line(document))
    out.print(table.ceilings_line(document["ceilings"]), highlight=False)
    parts = [
        *table.op_tables(document["rows"], document["problems"]),
        *table.model_tables(document["models"]),
        *(changes.tables(old, document) if old is not None else ()),
    ]
    for part in parts:
        out.print(part)
    for note in dict.fromkeys(row["note"] for row in document["rows"] if row["note"]):
        out.print(f"  {note}", style="dim")
    if any((row["share"] or 0) > 1.05 for row in document["rows"]):
        text = "more than 100%: the machine was busier while the ceilings were measured; measure again"
        out.print(f"  {text}", style="yellow")
    if document.get("interrupted"):
        out.print("interrupted: the figures above are those that were finished", style="yellow")
    if json_file == "-":
        terminal.write(document, json_file)
    elif json_file is not None:
        out.print(f"written: {json_file}", highlight=False)
    if plot is not None:
        try:
            count = roofline.draw(plot, document, _plot_title(document))
        except (ValueError, ImportError) as error:
            raise terminal.fail(str(error)) from error
        out.print(f"drawn: {plot}, {count} points", highlight=False)


def _machine_line(document: dict[str, Any]) -> str:
    where = document["machine"]
    names = [gpu["name"] for gpu in where["gpus"]] or [where["cpu"]["model"]]
    return (
        f"{', '.join(names)}; {where['cpu']['processors']} processors; PyTorch {where['versions']['torch']}"
    )


def _plot_title(document: dict[str, Any]) -> str:
    what = [
        ", ".join(dict.fromkeys(row[name] for row in document["rows"])) for name in ("op", "preset", "dtype")
    ]
    return f"{'; '.join(what)}\n{_machine_line(document)}"


def _names(given: str | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(filter(None, (name.strip() for name in given.split(","))))


def _numbers(option: str, given: str | None) -> tuple[int, ...]:
    numbers = _names(given) or ()
    for number in numbers:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"--{option} takes whole numbers of at least 1, separated by commas, got {given!r}"
            )
    return tuple(map(int, numbers))


def _check_files(json_file: str | None, plot: str | None, compare: str | None, resume: bool) -> None:
    """Raises what a user should know before minutes of measuring."""
    if resume and json_file in (None, "-", AUTO):
        raise terminal.fail("--resume goes on with a result: name its file with --json")
    for option, file in (("--json", json_file), ("--plot", plot)):
        folder = RESULTS if file == AUTO else Path(file or ".").parent
        if file != "-" and not folder.is_dir():
            raise terminal.fail(f"{option} {file}: there is no folder {folder}")
    if compare is not None and not Path(compare).is_file():
        raise terminal.fail(f"--compare {compare}: there is no such file")


def auto_name(op: str | None) -> str:
    """benchmarks/results/DATE-OPS-MACHINE.json"""
    from dsopt import machine

    where = [gpu["name"] for gpu in machine.gpus()] or [machine.cpu()["model"]]
    words = re.findall(r"[a-z0-9]+", f"{(op or 'all').replace('_', '')} {where[0]}".lower())
    return str(RESULTS / f"{time.strftime('%Y-%m-%d')}-{'-'.join(words)}.json")


def script(file: str, text: str, ops: str | None) -> None:
    """Runs the command as a script in `benchmarks/`. text: its help, with examples; ops: its default for --op."""
    run_script(file, text, bench, {"op": ops})


def run_script(file: str, text: str, command: Callable[..., None], defaults: dict[str, Any]) -> None:
    """Runs any command as a script in `benchmarks/`. text: its help, with examples."""
    # the script's folder is on the module path, where its coverage.py would pass for the package of that name
    folder = Path(file).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=_help(text), context_settings={"default_map": defaults})(command)
    app()


def _help(text: str) -> str:
    """Keeps the lines of a help text as they are: a \\b of its own stops click from wrapping a paragraph."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.strip().split("\n\n"))
