"""The passes in order, run one by one with their effects checked."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from torch.fx import GraphModule

from dsopt.effects import Order, check_effects, effects, is_impure
from dsopt.files import write_text
from dsopt.rewrite import Log, OutOfFuel

PIPELINE = (
    "canonicalize",
    "canonicalize_attention",
    "fuse_rms_norm",
    "fuse_rope",
    "fuse_gated_mlp",
    "absorb_mla",
    "merge_linears",
    "canonicalize",
)


def run_pipeline(gm: GraphModule, passes: Sequence[str] | None = None, name: str = "graph") -> list[Log]:
    """Runs passes over a captured graph in place and says what each did.

    passes: names of modules in `dsopt.passes`, in order; PIPELINE by default. Raises ValueError for an
    unknown name or a bad DSOPT_FUEL, before the graph is changed, and EffectError if a pass moved a read
    across a write.

    DSOPT_DUMP=dir writes the graph before the first and after each pass to `dir/<name>.<step>.<pass>.txt`.
    DSOPT_FUEL=n stops after n rewrites, to find the one that is wrong by bisection.
    """
    modules = [load_pass(p) for p in (PIPELINE if passes is None else passes)]
    limit = fuel()
    left = None if limit is None else [limit]
    dump(gm, f"{name}.0.captured")
    logs = []
    before = effects(gm)
    for step, module in enumerate(modules, 1):
        log = Log(module.__name__.rpartition(".")[2], Order(gm), left, getattr(module, "FAMILY", None))
        logs.append(log)
        try:
            module.run(gm, log)
        except OutOfFuel:
            modules = modules[:step]
        gm.graph.eliminate_dead_code(is_impure)
        gm.graph.lint()
        before = check_effects(before, effects(gm), log.name)
        dump(gm, f"{name}.{step}.{log.name}")
        if len(modules) == step:
            break
    gm.recompile()
    return logs


def fuel() -> int | None:
    """The number of rewrites that DSOPT_FUEL allows, or None. Raises ValueError for what is no such number."""
    given = os.environ.get("DSOPT_FUEL")
    if not given:
        return None
    if not given.strip().isdecimal():
        raise ValueError(f"DSOPT_FUEL must be a whole number of rewrites, got {given!r}")
    return int(given)


def load_pass(name: str):
    """The module of a pass. Raises ValueError naming the known passes for any other name."""
    known = available_passes()
    if name not in known:
        raise ValueError(f"unknown pass {name!r}; known passes: {', '.join(known)}")
    return importlib.import_module(f"dsopt.passes.{name}")


def available_passes() -> list[str]:
    """Names of all passes in the tree: those of PIPELINE first, then the others."""
    import dsopt.passes

    files = {p.stem for root in dsopt.passes.__path__ for p in Path(root).glob("*.py")} - {"__init__"}
    return [*(p for p in dict.fromkeys(PIPELINE) if p in files), *sorted(files - set(PIPELINE))]


def dump(gm: GraphModule, name: str) -> None:
    """Writes the graph's code to `$DSOPT_DUMP/<name>.txt`, if that variable is set."""
    folder = os.environ.get("DSOPT_DUMP")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    gm.recompile()
    write_text(Path(folder) / f"{name}.txt", gm.print_readable(print_output=False))
