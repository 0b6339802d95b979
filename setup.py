"""Packages and the optional native extension; everything else is in pyproject.toml."""

import os
import platform
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

PARTS = ("passes", "kernels", "models")  # top-level folders shipped inside dsopt
SOURCES = sorted(p.as_posix() for p in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(p.as_posix() for p in Path("csrc/include").rglob("*.h"))
ONCE = {"bindings", "runtime"}  # sources that are not compiled per instruction set

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
VARIANTS = {"portable": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    VBMI = (*AVX512, "-mavx512vbmi")
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512_vbmi": VBMI, "avx512_bf16": (*VBMI, "-mavx512bf16")}
# what avx512_vbmi has of its own; for all else it runs avx512
FP8_SOURCES = {"moe_experts", "multi_linear"}

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall")
# of `make sanitize`: for compiling and linking, behind all others
EXTRA = shlex.split(os.environ.get("DSOPT_CXXFLAGS", ""))
# torch has loaded its own OpenMP before; only the library name must be the same, which it is on Linux
OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()


def variants_of(source):
    """The instruction sets that a kernel's source is compiled for; None for what is compiled once."""
    if source in ONCE:
        return [None]
    return [v for v in VARIANTS if v != "avx512_vbmi" or source in FP8_SOURCES]


class BuildVariants(build_ext):
    """Compiles each kernel source once per instruction set and links all objects into one library."""

    def build_extension(self, ext):
        try:
            self.build_variants(ext)
        except CCompilerError:
            print("dsopt: native CPU kernels are not built: the compiler failed", file=sys.stderr)
            raise  # setuptools goes on without an extension that is optional

    def build_variants(self, ext):
        def compile_one(job):
            source, variant = job
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, variant or "once"),
                macros=[("DSOPT_VARIANT", variant)] if variant else [],
                include_dirs=ext.include_dirs,
                extra_postargs=[*FLAGS, *OPENMP, *(VARIANTS[variant] if variant else ["-O1"]), *EXTRA],
                depends=ext.depends,
            )

        # the largest first, so that no thread is left with it at the end
        sources = sorted(ext.sources, key=lambda s: -Path(s).stat().st_size)
        jobs = [(s, v) for s in sources for v in variants_of(Path(s).stem)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for built in pool.map(compile_one, jobs) for o in built]
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(objects, path, extra_postargs=[*OPENMP, *EXTRA], target_lang="c++")


def extensions():
    """The native extension, or nothing where it cannot be built; `optional` covers a compile that fails."""
    if sys.platform == "win32":
        reason = "it needs GCC or Clang"
    else:
        try:
            import pybind11
        except ImportError:
            reason = "pybind11 is not importable"
        else:
            include = ["csrc/include", pybind11.get_include()]
            native = {"include_dirs": include, "depends": HEADERS, "language": "c++", "optional": True}
            return [Extension("dsopt._cpu", SOURCES, **native)]
    print(f"dsopt: native CPU kernels are not built: {reason}", file=sys.stderr)
    return []


setup(
    packages=["dsopt", *(f"dsopt.{p}" for p in find_packages("dsopt"))]
    + [f"dsopt.{p}" for p in PARTS]
    + [f"dsopt.{p}.{s}" for p in PARTS for s in find_packages(p)],
    package_dir={"dsopt": "dsopt", **{f"dsopt.{p}": p for p in PARTS}},
    package_data={"dsopt": ["py.typed"], "dsopt.models": ["tiny_checkpoint/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildVariants},
)
