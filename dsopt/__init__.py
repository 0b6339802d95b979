"""dsopt: kernel and graph optimization for models with latent attention, experts and FP8 weights."""

from pathlib import Path

__version__ = "0.1.0"

# a checkout keeps passes/, kernels/ and models/ beside this folder; a wheel has them inside it
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
