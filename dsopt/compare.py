"""One transformers model run three ways (eager, Inductor, dsopt) on the same inputs, in turns.

Every figure is a median over calls that alternate between the ways, so that a slow moment of the machine
falls on all of them. A way that fails is left out with its error; the others go on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from dsopt.bench.clock import medians
from dsopt.capture import raise_recompile_limit
from dsopt.models import presets

WAYS = ("eager", "inductor", "dsopt")
ROOM = 64  # free slots of a cache beyond the tokens it holds


def quiet() -> None:
    """Silences what libraries say about themselves while models are built and compiled."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    # graphs of both compilers share one limit per function, and each cache size may need one of each
    raise_recompile_limit(64)


def ways(model: torch.nn.Module) -> dict[str, Callable]:
    """The model as each way calls it, weights shared."""
    import dsopt

    return {"eager": model, "inductor": torch.compile(model), "dsopt": dsopt.compile(model)}


def filled_cache(
    config: Any,
    cached: int,
    buffer: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
):
    """A StaticCache of `buffer` slots whose first `cached` hold random latents, as after a prefill."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=buffer or cached + ROOM)
    generator = torch.Generator().manual_seed(cached)
    for layer in range(config.num_hidden_layers):
        latent, rope = (
            torch.randn(1, 1, cached, width, generator=generator).to(device, dtype)
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(latent, rope, layer)
    return cache


def rewind(cache: Any, cached: int) -> None:
    """Forgets what was appended after the first `cached` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(cached)


def decode(model: Callable, token: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
    """Logits of one decode step that appends to the cache."""
    positions = torch.tensor([[position]], device=token.device)
    return model(
        input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits


def prefill(model: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of a prompt, without a cache."""
    return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


class Comparison:
    """Measures one model; each method returns plain data with one entry per way that works."""

    def __init__(self, model: torch.nn.Module, step: Callable[[str, str], None] = lambda phase, detail: None):
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.ways = ways(model)
        self.failed: dict[str, str] = {}
        self.step = step

    def _first_calls(self, what: str, call: Callable[[str], Any], only: Collection[str]) -> dict[str, Any]:
        """What each way returns from its first call, which compiles; a way that raises is dropped."""
        outputs = {}
        for way in [way for way in self.ways if way in only]:
            self.step(what, f"{way}, first call")
            try:
                outputs[way] = call(way)
            except Exception as error:  # one compiler's failure is a finding, not the end of the comparison
                self.failed[way] = f"{what}: {reason(error)}"
                del self.ways[way]
        return outputs

    def _medians(
        self, what: str, call: Callable[[str], Any], repetitions: int, chosen: Collection[str]
    ) -> dict[str, float]:
        def timed(way: str) -> Callable[[], None]:
            def run() -> None:
                call(way)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        def tell(way: str, done: int) -> None:
            self.step(what, f"{way}, {done + 1} of {repetitions}")

        # the host's clock on a GPU too: what Python adds to a step is part of it
        fns = {way: timed(way) for way in chosen}
        times = medians(fns, budget=0.0, min_rounds=repetitions, tell=tell)
        return {way: timing.seconds for way, timing in times.items()}

    @torch.inference_mode()
    def decode(
        self, cached: int, repetitions: int, buffer: int | None = None, only: Collection[str] = WAYS
    ) -> dict[str, Any]:
        """Seconds of a decode step with `cached` tokens in the cache, and each way's error against eager."""
        cache = filled_cache(self.config, cached, buffer, self.dtype, self.device)
        token = random_tokens(self.config.vocab_size, 1).to(self.device)
        size = buffer or cached + ROOM

        def call(way: str) -> torch.Tensor:
            rewind(cache, cached)
            return decode(self.ways[way], token, cache, cached)

        what = f"decode with {cached} cached in {size} slots, {torch.get_num_threads()} threads"
        logits = self._first_calls(what, lambda way: call(way).double(), only)
        return {
            "cached": cached,
            "buffer": size,
            "threads": torch.get_num_threads(),
            "repetitions": repetitions,
            "seconds": self._medians(what, call, repetitions, logits),
            "error": errors(logits),
        }

    @torch.inference_mode()
    def prefill(self, tokens: int, repetitions: int, only: Collection[str] = WAYS) -> dict[str, Any]:
        """Seconds of a forward pass over `tokens` new tokens, and each way's error against eager."""
        prompt = random_tokens(self.config.vocab_size, tokens).to(self.device)

        def call(way: str) -> torch.Tensor:
            return prefill(self.ways[way], prompt)

        what = f"prefill of {tokens}"
        logits = self._first_calls(what, lambda way: call(way).double(), only)
        return {
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "repetitions": repetitions,
            "seconds": self._medians(what, call, repetitions, logits),
            "error": errors(logits),
        }

    @torch.inference_mode()
    def greedy(self, cached: int, steps: int) -> dict[str, Any]:
        """How many of eager's greedy tokens each way would choose too, given the same tokens before.

        Random weights make close calls, so the smallest gap between eager's first and second choice is
        given with it: a way may differ where that gap is within the rounding of the logits.
        """
        cache = filled_cache(self.config, cached, dtype=self.dtype, device=self.device)
        tokens = [random_tokens(self.config.vocab_size, 1).to(self.device)]
        gap = float("inf")
        chosen: dict[str, list[int]] = {way: [] for way in self.ways}
        for way, model in self.ways.items():
            rewind(cache, cached)
            for i in range(steps):
                self.step("greedy tokens", f"{way}, {i + 1} of {steps}")
                logits = decode(model, tokens[i], cache, cached + i)[0, -1].float()
                best = logits.topk(2)
                chosen[way].append(int(best.indices[0]))
                if way == "eager":
                    gap = min(gap, float(best.values[0] - best.values[1]))
                    tokens.append(torch.tensor([[chosen[way][-1]]], device=self.device))
        same = {w: sum(a == b for a, b in zip(chosen["eager"], c)) for w, c in chosen.items()}
        return {"steps": steps, "same": same, "smallest_gap": gap}


def errors(logits: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 distance of each way's logits from eager's."""
    from dsopt.numerics import relative_l2

    return {
        w: relative_l2(y, logits["eager"]) for w, y in logits.items() if w != "eager" and "eager" in logits
    }


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak) of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M)[1]) * 1024


def cold_worker(way: str, preset: str, layers: int, cached: int, tiny: bool, threads: int) -> None:
    """Runs one way's first and second decode step in this process and prints the figures as JSON."""
    quiet()
    torch.set_num_threads(threads)
    values = presets.PRESETS[preset]()
    values = presets.tiny(values) if tiny else values
    model = presets.random_model(presets.config(values, num_hidden_layers=layers))
    with torch.inference_mode():
        cache = filled_cache(model.config, cached)
        token = random_tokens(model.config.vocab_size, 1)
        before = resident("VmRSS")
        # writing 5 makes the peak start again from here
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        call = ways(model)[way]
        decode(call, token, cache, cached)
        first = time.perf_counter() - start
        peak = resident("VmHWM")
        rewind(cache, cached)
        start = time.perf_counter()
        decode(call, token, cache, cached)
        second = time.perf_counter() - start
    print(json.dumps({"first_s": first, "compile_s": first - second, "peak_growth": peak - before}))


_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "DSOPT_CACHE_DIR")


def starts(
    way: str, preset: str, layers: int, cached: int, tiny: bool = False, count: int = 2
) -> list[dict[str, float]]:
    """First decode steps of one way in fresh processes that share compiler caches, which are empty at first.

    The first entry is the cold start, the others are warm ones. first_s: seconds of the first step; compile_s: those
    beyond a second one; peak_growth: bytes of resident memory that the first step needed at its peak beyond what was
    there before compiling. tiny: at tiny widths. Raises RuntimeError with the last line a process said if it failed.
    """
    args = way, preset, layers, cached, tiny, torch.get_num_threads()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        caches = dict.fromkeys(_CACHES, folder) | {"DSOPT_CACHE": "1"}
        for _ in range(count):
            # the empty folder is also the working directory: -c puts it first on the module path
            done = subprocess.run(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    f"from dsopt.compare import cold_worker; cold_worker{args}",
                ],
                cwd=folder,
                env={**os.environ, **caches, "TOKENIZERS_PARALLELISM": "false"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["failed without a message"])[-1])
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def cold_start(way: str, preset: str, layers: int, cached: int) -> dict[str, float]:
    """The cold one of `starts`."""
    return starts(way, preset, layers, cached, count=1)[0]
