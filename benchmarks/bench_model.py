"""What a decode step of a tiny-width model costs besides its kernels: python benchmarks/bench_model.py --layers 3,27"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dsopt import compare
from dsopt.bench.model import overhead
from dsopt.bench.overhead import PARTS


def main(
    layers: Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")] = "3,27",
    model: Annotated[str, typer.Option(help="A preset, whose tiny widths are taken.")] = "v2-lite",
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 128,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    torch.set_num_threads(threads)
    compare.quiet()
    table = Table(title=f"ms of a decode step, {model} at tiny widths, {context} cached")
    columns = ("whole", *PARTS)
    for column in ("layers", *columns, "computing", "views"):
        table.add_column(column, justify="right")
    for count in map(int, layers.split(",")):
        row = overhead(model, count, context)
        ms = [f"{1e3 * row[column]:.3f}" for column in columns]
        table.add_row(str(count), *ms, str(row["computing"]), str(row["views"]))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
