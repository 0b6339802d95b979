"""The command line of `benchmarks/accuracy.py`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dsopt import machine, terminal
from dsopt.bench import accuracy
from dsopt.bench.command import AUTO, RESULTS, auto_name
from dsopt.models import tiny
from dsopt.progress import Steps

PROMPT = 256  # tokens before the steps that are compared


def main(
    model: Annotated[
        Path, typer.Option(help="Folder of a checkpoint in bfloat16 whose tokens are bytes.")
    ] = tiny.PATH,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the text; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are compared.")] = 256,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time, and prompts.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, instead of PyTorch's choice.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help=f"Write the result; - is standard output, auto a dated file in {RESULTS}.",
        ),
    ] = None,
) -> None:
    """Perplexity of the small trained model on held-out source: eager, dsopt, FP8 weights, FP8 cache."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    text = tiny.text(tiny.HELDOUT)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        found = measure(loaded, text.tokens[:tokens], steps, context, batch)
    except (ValueError, OSError) as error:
        raise terminal.fail(str(error)) from error
    found["text"] |= {"sha256": text.sha256, "files": list(text.files)}
    out = terminal.console(json_file)
    for part in (table(found["rows"]), agreement(found)):
        out.print(part, highlight=False)
    terminal.write(found, auto_name("accuracy") if json_file == AUTO else json_file)


def measure(
    model: torch.nn.Module, tokens: torch.Tensor, steps: int, context: int, batch: int
) -> dict[str, Any]:
    """All figures as plain data, with the machine they are of."""
    starts = torch.arange(batch) * (tokens.numel() // batch)
    prompts = tokens[starts[:, None] + torch.arange(min(PROMPT, tokens.numel() // batch))].long()
    with Steps(terminal.console("-")) as step:
        rows = accuracy.perplexities(model, tokens, context, batch, step)
        step("FP8 cache beside bfloat16 cache", f"{steps} steps")
        import dsopt

        same = accuracy.same_steps(dsopt.compile(model), prompts, steps)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine.describe(),
        "text": {"tokens": tokens.numel(), "context": context},
        "rows": rows,
        "steps": {"steps": steps, "prompts": batch, "prompt": prompts.shape[1], "same_token": same},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Perplexity by way, and beside it how far from eager bfloat16 it may be."""
    made = Table(title="Perplexity on held-out text", title_justify="left")
    for column in (
        "way",
        "nats a token",
        "perplexity",
        f"over {accuracy.BASE}",
        "at most",
        "same likeliest token",
    ):
        left = column == "way"
        made.add_column(column, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        limit = accuracy.TARGETS.get(row["way"])
        made.add_row(
            row["way"],
            f"{row['loss']:.5f}",
            f"{row['perplexity']:.5f}",
            f"{row['over_base']:+.3%}",
            "" if limit is None else _verdict(row["over_base"] <= limit, f"{limit:+.1%}"),
            f"{row['same_token']:.2%}",
        )
    return made


def agreement(found: dict[str, Any]) -> str:
    """One line about the steps with an FP8 cache."""
    steps, same = found["steps"], found["steps"]["same_token"]
    return (
        f"FP8 cache beside a bfloat16 one: the same token in {same:.2%} of {steps['steps']} steps behind "
        f"{steps['prompts']} prompts of {steps['prompt']}; at least "
        + _verdict(same >= accuracy.SAME_TOKEN, f"{accuracy.SAME_TOKEN:.0%}")
    )


def _verdict(held: bool, target: str) -> str:
    return f"[green]{target}[/]" if held else f"[red]{target}, missed[/]"
