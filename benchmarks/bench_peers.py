"""dsopt beside llama.cpp and ik_llama.cpp; see --help."""

import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """
Decoding and prefill in tokens per second beside llama.cpp and ik_llama.cpp at BF16, in turns, and the share that
decoding reaches of what this machine's memory and multiply-add units allow. The GGUF file must have the preset's
geometry with --layers layers and --vocabulary tokens; its weights may be random.

  python benchmarks/bench_peers.py v2l3.gguf --llama build/bin/llama-bench
  python benchmarks/bench_peers.py v2l3.gguf --ik ik/bin/llama-bench --threads 1,2 --json peers.json
"""

Numbers = Annotated[str, typer.Option(help="Numbers, separated by commas.")]


def main(
    gguf: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    llama: Annotated[Path | None, typer.Option(exists=True, help="llama.cpp's llama-bench.")] = None,
    ik: Annotated[Path | None, typer.Option(exists=True, help="ik_llama.cpp's llama-bench.")] = None,
    preset: str = "v2-lite",
    layers: int = 3,
    vocabulary: int = 1024,
    context: Numbers = "128,2048,8192",
    prefill: Numbers = "512,2048",
    threads: Numbers = "1",
    rounds: int = 3,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="- is standard output.")
    ] = None,
) -> None:
    from dsopt import machine, terminal
    from dsopt.bench import peers
    from dsopt.progress import Steps

    numbers = [tuple(int(n) for n in given.split(",") if n) for given in (context, prefill, threads)]
    paths = {name: str(path) for name, path in (("llama", llama), ("ik", ik)) if path is not None}
    plan = peers.Plan(paths, str(gguf), preset, layers, vocabulary, *numbers, rounds)
    try:
        with Steps(terminal.console("-")) as step:
            found = peers.run(plan, step)
    except (ValueError, RuntimeError) as error:
        raise terminal.fail(str(error)) from error
    terminal.console(json_file).print(peers.table(found["rows"]))
    terminal.write({"machine": machine.describe(), **found}, json_file)


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    # the script's folder is on the module path, where its coverage.py would pass for the package of that name
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help="\n\n".join(f"\b\n{paragraph}" for paragraph in HELP.strip().split("\n\n")))(main)
    app()
