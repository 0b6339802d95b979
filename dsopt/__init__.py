"""dsopt: kernel and graph optimization for models with latent attention, experts and FP8 weights.

model.compile(backend="dsopt")      no import of dsopt needed
fast = dsopt.compile(model)         a shallow copy whose generate runs compiled
print(dsopt.report(fast))           what was fused, which kernels run, and why the rest is as it was
dsopt.verify(model, inputs)         the error of every rewritten site against eager
dsopt.quantize_(model)              its linears and experts in FP8, in place
dsopt.LatentCache(config)           a cache of latents in FP8 for generate(past_key_values=...)
model = dsopt.load(folder)          a checkpoint of transformers, in FP8 where its weights are
dsopt.save(model, folder)           and back
"""

from pathlib import Path

__version__ = "0.1.0"

# a checkout keeps passes/, kernels/ and models/ beside this folder; a wheel has them inside it
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from dsopt.backend import Options
from dsopt.checkpoint import CheckpointError, load, save
from dsopt.fp8 import FP8Block, FP8Group, FP8Row
from dsopt.fp8.convert import quantize_
from dsopt.prepare import compile, refresh
from dsopt.report import report
from dsopt.verify import VerifyError, verify

__all__ = [
    "CheckpointError",
    "FP8Block",
    "FP8Group",
    "FP8Row",
    "LatentCache",
    "Options",
    "VerifyError",
    "__version__",
    "compile",
    "load",
    "quantize_",
    "refresh",
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    """What needs transformers is imported where it is asked for."""
    if name == "LatentCache":
        from dsopt.cache import LatentCache

        return LatentCache
    raise AttributeError(f"module 'dsopt' has no attribute {name!r}")
