"""The passes in order, run one by one with their effects checked."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from torch.fx import GraphModule

from dsopt.effects import Order, check_effects, effects, is_impure
from dsopt.files import write_text
from dsopt.rewrite import Log, OutOfFuel

PIPELINE = (
    "canonicalize",
    "fuse_dequantize",  # before what reads weights: dequantized ones are one node then
    "fuse_absorbed_mla",
    "canonicalize_attention",
    "fuse_rope",  # before the norms: the sum in a rotation is no residual
    "fuse_rms_norm",
    "fuse_gated_mlp",
    "fuse_router",
    "batch_experts",
    "fold_shared_experts",
    "absorb_mla",
    "fuse_attention",
    "merge_linears",
    "fold_dequantize",
    "canonicalize",
    "share_repeats",
)
LEFT_OUT = "left out, it failed"


def run_pipeline(
    gm: GraphModule, passes: Sequence[str] | None = None, name: str = "graph", strict: bool = True
) -> list[Log]:
    """Runs passes over a captured graph in place and says what each did.

    passes: names of modules in `dsopt.passes`, in order; PIPELINE by default.
    strict: raise what a pass raised, or the EffectError if it moved a read across a write. Otherwise that pass is
        left out: the graph is as if it were not in the pipeline, and its log has the reason as its only miss.
    Raises ValueError for an unknown pass or a bad DSOPT_FUEL, before the graph is changed.

    DSOPT_DUMP=dir writes the graph before the first and after each pass to `dir/<name>.<step>.<pass>.txt`.
    DSOPT_FUEL=n stops after n rewrites, to find the one that is wrong by bisection.
    """
    modules = [load_pass(p) for p in (PIPELINE if passes is None else passes)]
    limit = fuel()
    # one copy, and the passes once more where one fails: cheaper than a copy before each pass
    captured = None if strict else copy.deepcopy(gm.graph)
    failed: dict[int, str] = {}
    while True:
        try:
            return _run(gm, modules, failed, limit, name)
        except PassError as error:
            if strict:
                raise error.__cause__ from None
            failed[error.step] = f"{LEFT_OUT}: {type(error.__cause__).__name__}: {error.__cause__}"
            gm.graph = copy.deepcopy(captured)


class PassError(Exception):
    """The pass at a step of the pipeline failed; the cause says how."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


def _run(
    gm: GraphModule, modules: Sequence[ModuleType], failed: Mapping[int, str], limit: int | None, name: str
) -> list[Log]:
    """The pipeline without the steps that failed; PassError for another one that does."""
    left = None if limit is None else [limit]
    dump(gm, f"{name}.0.captured")
    logs = []
    before = effects(gm)
    for step, module in enumerate(modules, 1):
        log = Log(module.__name__.rpartition(".")[2], Order(gm), left, getattr(module, "FAMILY", None))
        logs.append(log)
        if step in failed:
            log.misses.append({"site": "", "reason": failed[step]})
            continue
        try:
            finished = _apply(module, gm, log)
            before = check_effects(before, effects(gm), log.name)
        except Exception as error:
            raise PassError(step) from error
        dump(gm, f"{name}.{step}.{log.name}")
        if not finished:
            break
    gm.recompile()
    return logs


def _apply(module: ModuleType, gm: GraphModule, log: Log) -> bool:
    """Runs one pass and clears away what nothing reads any more; False when the fuel ran out."""
    try:
        module.run(gm, log)
        finished = True
    except OutOfFuel:
        finished = False
    gm.graph.eliminate_dead_code(is_impure)
    gm.graph.lint()
    return finished


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
