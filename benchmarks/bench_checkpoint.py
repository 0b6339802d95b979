"""An FP8 checkpoint from disk to tokens; see --help."""

import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """
Loads an FP8 checkpoint, compiles the model and decodes one random token at a time over a filled StaticCache: seconds
to load, resident memory, tokens per second, and the share of this machine's measured read bandwidth that the weights
and latents of a step take. `python -m dsopt.models.synthetic` writes such a checkpoint with random weights.

  python benchmarks/bench_checkpoint.py v2-lite-fp8
  python benchmarks/bench_checkpoint.py v2-lite-fp8 --context 128,2048 --threads 1 --json checkpoint.json
"""


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    context: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "128,2048",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that count.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Instead of PyTorch's choice.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="At most so many layers.")] = None,
    quick: Annotated[bool, typer.Option(help="A ceiling from little data: shows that it runs.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="- is standard output.")
    ] = None,
) -> None:
    import torch

    from dsopt import compare, machine, terminal
    from dsopt.bench import checkpoint
    from dsopt.progress import Steps

    compare.quiet()
    try:
        cached = tuple(int(number) for number in context.split(","))
        plan = checkpoint.Plan(folder, cached, steps, threads or torch.get_num_threads(), layers, quick)
        with Steps(terminal.console("-")) as step:
            found = checkpoint.run(plan, step)
    except (ValueError, OSError, MemoryError) as error:
        raise terminal.fail(str(error)) from error
    for table in checkpoint.tables(found):
        terminal.console(json_file).print(table)
    terminal.write({"machine": machine.describe(), **found}, json_file)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # the script's folder is on the module path, where its coverage.py would pass for the package of that name
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help="\n\n".join(f"\b\n{paragraph}" for paragraph in HELP.strip().split("\n\n")))(main)
    app()
