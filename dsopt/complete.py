"""The demo that writes: the small trained model completes Python source in eager and in dsopt, byte by byte."""

from __future__ import annotations

import codecs
import copy
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsopt.models import presets, tiny

PROMPT = '''"""Reading and writing of settings."""

import os
import sys


class Settings:
    """Settings of a program, by name."""

    def __init__(self, path=None):
'''
NARROW = "dsopt, FP8 weights and cache"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}


class Printer:
    """A streamer for `generate` that prints bytes as text when they come, and knows when they came."""

    def __init__(self, console: Console):
        self.console = console
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        text = self.decoder.decode(bytes(t for t in value.flatten().tolist() if t != tiny.END))
        style = "cyan" if self.times else "dim"
        self.console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.console.print()

    @property
    def rate(self) -> float:
        """Tokens a second behind the first, which pays for the prompt."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def show(
    console: Console, prompt: str = PROMPT, tokens: int = 200, folder: Path = tiny.PATH
) -> dict[str, Any]:
    """Completes a prompt greedily and sampled, each way; prints text and rates, and returns them as plain data.

    tokens: at most so many new ones, at least 3. Raises OSError where there is no checkpoint in the folder.
    """
    import transformers

    import dsopt

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    # no end of text, so that every way makes as many tokens
    model.generation_config.eos_token_id = None
    ids = tiny.encode(prompt)
    room = ids.shape[1] + tokens
    results = []
    for name, way, cache in _ways(model, room):
        way.generate(ids, past_key_values=cache(), max_new_tokens=4)  # compiles
        for how, options in (("greedy", {"do_sample": False}), ("sampled", SAMPLING)):
            torch.manual_seed(0)
            console.rule(f"{name}, {how}", align="left")
            printer = Printer(console)
            out = way.generate(
                ids, past_key_values=cache(), streamer=printer, max_new_tokens=tokens, **options
            )
            text = tiny.decode(out[0, ids.shape[1] :])
            results.append({"way": name, "how": how, "text": text, "tokens_per_s": printer.rate})
    console.print(table(results))
    for name, config in (("this model", model.config), ("DeepSeek-V3", presets.config(presets.v3()))):
        cache = dsopt.LatentCache(config)
        console.print(
            f"{name}: a token takes {cache.bytes_per_token} bytes a layer in an FP8 cache, "
            f"{cache.expanded_bytes_per_token} as keys and values of every head in bfloat16",
            highlight=False,
        )
    return {"prompt": prompt, "cached": room, "completions": results}


def _ways(model: torch.nn.Module, room: int):
    """(name, model, what makes its cache) of each way that completes."""
    from transformers import StaticCache

    import dsopt

    yield "eager", model, lambda: StaticCache(config=model.config, max_cache_len=room)
    yield "dsopt", dsopt.compile(model), lambda: StaticCache(config=model.config, max_cache_len=room)
    narrow = copy.deepcopy(model)
    dsopt.quantize_(narrow, progress=False)
    yield (
        "dsopt, FP8 weights and cache",
        dsopt.compile(narrow),
        lambda: dsopt.LatentCache(model.config, "fp8", room),
    )


def table(results: list[dict[str, Any]]) -> Table:
    """Tokens a second, and how many times eager's."""
    made = Table(title="Tokens a second", title_justify="left")
    for column in ("way", "greedy", "sampled", "greedy, over eager"):
        made.add_column(column, justify="left" if column == "way" else "right")
    rates = {(r["way"], r["how"]): r["tokens_per_s"] for r in results}
    for way in dict.fromkeys(r["way"] for r in results):
        greedy, sampled = rates[way, "greedy"], rates[way, "sampled"]
        made.add_row(way, f"{greedy:.0f}", f"{sampled:.0f}", f"{greedy / rates['eager', 'greedy']:.1f}x")
    return made
