"""dsopt beside llama.cpp and ik_llama.cpp on one geometry, in turns, and beside what this machine's memory allows.

A peer runs a GGUF file of the same geometry through its own `llama-bench`, one process a figure; dsopt runs random
weights in this process. Every decode step has a random token, so that experts change from step to step, as
`llama-bench` does it.

The floor of a decode step, with W the bytes of the weights one token uses, C the bytes of one layer's cache, and F the
FLOPs of one layer's absorbed attention, is W / bandwidth + layers * max(C / bandwidth, F / peak).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from dsopt import compare
from dsopt.bench import ceilings
from dsopt.bench.ceilings import BANDWIDTH, Ceilings
from dsopt.bench.table import plain
from dsopt.models import presets

STEPS = 24  # tokens generated for a figure


@dataclass(frozen=True)
class Plan:
    """peers: name (llama or ik) -> path of its llama-bench. model: a GGUF file of the preset's geometry.

    context: cached tokens of the decode steps; prefill: lengths of prompts. vocabulary: that of the GGUF file.
    """

    peers: Mapping[str, str]
    gguf: str
    preset: str = "v2-lite"
    layers: int = 3
    vocabulary: int = 1024
    context: Sequence[int] = (128, 2048, 8192)
    prefill: Sequence[int] = (512, 2048)
    threads: Sequence[int] = (1,)
    rounds: int = 3


def run(plan: Plan, step: Callable[[str, str], None] = lambda what, detail: None) -> dict[str, Any]:
    """{"ceilings": ..., "rows": ...}: one row a phase, size and number of threads, with tokens a second of each way.

    Raises ValueError if a peer's model has another number of parameters, RuntimeError with what a peer said last.
    """
    compare.quiet()
    found = ceilings.measure("cpu", tuple(plan.threads), step=step)
    values = presets.PRESETS[plan.preset]() | {"vocab_size": plan.vocabulary}
    config = presets.config(values, num_hidden_layers=plan.layers)
    model = presets.random_model(config)
    step("compiling", "")
    import dsopt

    fast = dsopt.compile(model)
    turns = _Turns(plan, sum(p.numel() for p in model.parameters()), step)
    rows = []
    for threads in plan.threads:
        torch.set_num_threads(threads)
        for cached in plan.context:
            rates = turns.rates("decode", cached, threads, lambda n=cached: _decode(fast, config, n))
            limit = 1 / floor(model, config, cached, found, threads)
            rows.append({"what": "decode", "size": cached, "threads": threads, "limit": limit, **rates})
        for tokens in plan.prefill:
            rates = turns.rates("prefill", tokens, threads, lambda n=tokens: _prefill(fast, config, n))
            rows.append({"what": "prefill", "size": tokens, "threads": threads, "limit": None, **rates})
    return {"ceilings": found.to_list(), "rows": rows}


class _Turns:
    """dsopt and its peers, one after the other, for as many rounds as are planned."""

    def __init__(self, plan: Plan, parameters: int, step: Callable[[str, str], None]):
        self.plan, self.parameters, self.step = plan, parameters, step

    def rates(self, what: str, size: int, threads: int, ours: Callable[[], float]) -> dict[str, Any]:
        """Tokens a second by way: the median and the best of all rounds."""
        phase = f"{what} {size}, {threads} threads"
        self.step(phase, "dsopt compiles")
        ours()
        found: dict[str, list[float]] = {way: [] for way in ("dsopt", *self.plan.peers)}
        for i in range(self.plan.rounds):
            self.step(phase, f"round {i + 1} of {self.plan.rounds}")
            found["dsopt"].append(ours())
            for peer in self.plan.peers:
                found[peer].append(self._peer(peer, what, size, threads))
        return {
            "median": {way: statistics.median(rates) for way, rates in found.items()},
            "best": {way: max(rates) for way, rates in found.items()},
        }

    def _peer(self, peer: str, what: str, size: int, threads: int) -> float:
        """Tokens a second of one call of a peer."""
        command = peer_command(peer, self.plan.peers[peer], self.plan.gguf, what, size, threads)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["failed without a message"]
            raise RuntimeError(f"{peer}: {said[-1]}")
        text = done.stdout  # ik prints lines of its own between the list and the one figure in it
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        if abs(found["model_n_params"] - self.parameters) > 0.01 * self.parameters:
            raise ValueError(
                f"gguf must have the {self.parameters} parameters of {self.plan.preset}, "
                f"{peer} read {found['model_n_params']}"
            )
        return float(found["samples_ts"][0])


@torch.inference_mode()
def _decode(fast: torch.nn.Module, config: Any, cached: int) -> float:
    """Tokens a second of a run of STEPS steps: one figure, as llama-bench gives it."""
    cache = compare.filled_cache(config, cached)
    tokens = compare.random_tokens(config.vocab_size, STEPS, seed=time.time_ns() % 2**31)
    compare.decode(fast, tokens[:, :1], cache, cached)
    compare.rewind(cache, cached)
    start = time.perf_counter()
    for i in range(STEPS):
        compare.decode(fast, tokens[:, i : i + 1], cache, cached + i)
    return STEPS / (time.perf_counter() - start)


@torch.inference_mode()
def _prefill(fast: torch.nn.Module, config: Any, tokens: int) -> float:
    prompt = compare.random_tokens(config.vocab_size, tokens)
    start = time.perf_counter()
    compare.prefill(fast, prompt)
    return tokens / (time.perf_counter() - start)


def peer_command(peer: str, path: str, gguf: str, what: str, size: int, threads: int) -> list[str]:
    """The llama-bench call for one figure. llama.cpp wants its flash attention asked for; ik's is on by default."""
    command = [path, "-m", gguf, "-t", str(threads), "-r", "1", "-o", "json"]
    if peer == "llama":
        command += ["-fa", "1"]
    if what == "prefill":
        return [*command, "-p", str(size), "-n", "0"]
    if peer == "llama":
        return [*command, "-p", "0", "-n", str(STEPS), "-d", str(size)]
    return [*command, "-p", "0", "-n", "0", "-gp", f"{size},{STEPS}"]


def active_bytes(model: torch.nn.Module, config: Any) -> int:
    """Bytes of the weights that one token uses: of the experts those it chooses, of the embedding one row."""
    total = 0
    for name, p in model.named_parameters():
        size = p.numel() * p.element_size()
        if ".experts." in name and p.ndim == 3:
            size = size // p.shape[0] * config.num_experts_per_tok
        elif name.endswith("embed_tokens.weight"):
            size //= p.shape[0]
        total += size
    return total


def floor(model: torch.nn.Module, config: Any, cached: int, found: Ceilings, threads: int) -> float:
    """Seconds of a decode step that memory and multiply-add units allow; see the module."""
    bandwidth, peak = found.rate(BANDWIDTH, threads), found.compute("bfloat16", threads)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    cache = cached * (rank + rope) * 2
    flops = 2 * config.num_attention_heads * cached * (2 * rank + rope)
    return active_bytes(model, config) / bandwidth + config.num_hidden_layers * max(
        cache / bandwidth, flops / peak
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Medians, dsopt's ratio to each peer's, and the share it reaches of what the machine allows."""
    peers = [way for way in rows[0]["median"] if way != "dsopt"]
    made = plain("tokens per second, medians")
    for name in ("", "threads", "dsopt", "of the limit", *peers, *(f"dsopt over {peer}" for peer in peers)):
        made.add_column(name, justify="right" if name else "left")
    for row in rows:
        rates = row["median"]
        what = f"decode, {row['size']} cached" if row["what"] == "decode" else f"prefill of {row['size']}"
        share = "" if row["limit"] is None else f"{rates['dsopt'] / row['limit']:.0%}"
        over = [f"{rates['dsopt'] / rates[peer]:.2f}x" for peer in peers]
        shown = [f"{rates[way]:.1f}" for way in peers]
        made.add_row(what, str(row["threads"]), f"{rates['dsopt']:.1f}", share, *shown, *over)
    return made
