"""One run of the benchmarks: what was asked for, what is done, and the document that holds the results.

The document is plain data: `started`, `seconds`, `machine`, `ceilings`, `rows` and `problems` of ops (see
`dsopt.bench.run`), `models` and `overhead`. It is saved after each case, so an interrupt or a crash keeps what was
finished, and a later run can go on from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dsopt import machine
from dsopt.bench import ceilings, model
from dsopt.bench.cases import Geometry, cases, chosen_sizes, geometry
from dsopt.bench.run import Choice, Runner
from dsopt.models.presets import PRESETS
from dsopt.ops import OPS
from dsopt.progress import Steps
from dsopt.trial import DTYPES

MODEL = "model"  # stands beside the ops for whole models
DEVICES = ("cpu", "cuda")
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What to measure. Empty tokens, context or batch: useful ones for each op.

    Raises ValueError naming what there is for an unknown op, preset, dtype, device, backend or baseline.
    """

    ops: Sequence[str] = tuple(OPS)
    presets: Sequence[str] = ("v2-lite",)
    backends: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    dtypes: Sequence[str] = ("bfloat16",)
    tokens: Sequence[int] = ()
    context: Sequence[int] = ()
    batch: Sequence[int] = ()
    threads: Sequence[int] = ()
    device: str = "cpu"
    layers: Sequence[int] = ()
    quick: bool = False
    seconds: float = 3.0

    def __post_init__(self):
        for kind, given, known in (
            ("op", self.ops, [*OPS, MODEL]),
            ("preset", self.presets, list(PRESETS)),
            ("dtype", self.dtypes, list(DTYPES)),
            ("device", [self.device], list(DEVICES)),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown {kind} {name!r}; known {kind}s: {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, but PyTorch sees no GPU here; known devices: cpu")
        if any(op != MODEL for op in self.ops):
            _ = self.choice
        if MODEL in self.ops:
            model.known_ways(self.baselines)

    @property
    def choice(self) -> Choice:
        return Choice(self.backends, self.baselines, 0.0 if self.quick else self.seconds, cold=not self.quick)

    @property
    def thread_counts(self) -> tuple[int, ...]:
        return (0,) if self.device == "cuda" else tuple(self.threads) or (torch.get_num_threads(),)


def new_document() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": 0.0,
        "machine": machine.describe(),
        "ceilings": [],
        "rows": [],
        "problems": [],
        "models": [],
        "done": [],
    }


def read_document(path: str | Path) -> dict[str, Any]:
    """A saved document. Raises ValueError for a file that is none of this format."""
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of dsopt bench of format {FORMAT}")
    return document


def run(request: Request, document: dict[str, Any], step: Steps, save: Callable[[], None]) -> None:
    """Measures what is asked for and not in the document yet, and puts it there; `save` is called after each part.

    Ctrl-C comes through as KeyboardInterrupt, with the finished parts in the document.
    """
    start = time.perf_counter()
    before, threads = document["seconds"], torch.get_num_threads()
    torch.manual_seed(0)
    try:
        limits = _ceilings(request, document, step)
        save()
        parts = [*_op_parts(request, limits, step), *_model_parts(request, step)]
        step.expect(len(parts))
        for key, part in parts:
            if key not in document["done"]:
                part(document)
                document["done"].append(key)
                document["seconds"] = before + time.perf_counter() - start
                save()
            step.advance()
    finally:
        torch.set_num_threads(threads)


def _ceilings(request: Request, document: dict[str, Any], step: Steps) -> ceilings.Ceilings:
    """Those of the document if they have what is needed, else new ones."""
    found = ceilings.Ceilings.of_list(document["ceilings"])
    if any(found.rate(ceilings.BANDWIDTH, count) is None for count in request.thread_counts):
        found = ceilings.measure(request.device, request.thread_counts, request.quick, step)
        document["ceilings"] = found.to_list()
    return found


Part = tuple[str, Callable[[dict[str, Any]], None]]


def _places(request: Request) -> Iterator[dict[str, Any]]:
    """What goes into every row, for each combination of what was asked for."""
    for preset, dtype, threads in product(request.presets, request.dtypes, request.thread_counts):
        yield {"preset": preset, "dtype": dtype, "device": request.device, "threads": threads}


def _op_parts(request: Request, limits: ceilings.Ceilings, step: Steps) -> Iterator[Part]:
    for where in _places(request):
        for name in [op for op in request.ops if op != MODEL]:
            geo = geometry(where["preset"], DTYPES[where["dtype"]], request.device, request.quick)
            yield from _cases(request, name, geo, where, Runner(request.choice, limits, step))


def _cases(
    request: Request, name: str, geo: Geometry, where: dict[str, Any], runner: Runner
) -> Iterator[Part]:
    """The cases of one op in order, so that what was slow is left out of the larger ones."""
    sizes = chosen_sizes(name, request.tokens, request.context, request.batch, request.quick)
    for case in cases(OPS[name], geo, sizes):

        def part(document: dict[str, Any], case=case) -> None:
            if where["threads"]:
                torch.set_num_threads(where["threads"])
            rows, problems = runner.measure(case, where)
            document["rows"] += rows
            document["problems"] += problems
            # each case compiles the same functions for other sizes, which count against Dynamo's limit
            torch.compiler.reset()
            geo.data.kept.clear()

        yield _key(name, case.title, *where.values()), part


def _model_parts(request: Request, step: Steps) -> Iterator[Part]:
    if MODEL not in request.ops:
        return
    loaded = model.Loaded(step)
    for where in _places(request):
        for plan in _plans(request, where):
            yield from _units(plan, {**where, "layers": plan.layers, "tiny": plan.tiny}, loaded)


def _plans(request: Request, where: dict[str, Any]) -> Iterator[model.ModelPlan]:
    """One for each number of layers; the overhead, which has numbers of its own, goes with the first."""
    layers = tuple(request.layers) or (3,)
    usual = model.ModelPlan(where["preset"], layers[0], where["dtype"], request.device)
    context, prefill, overhead = usual.context, usual.prefill, usual.overhead
    if request.quick:
        context, prefill, overhead = (16,), (5,), layers[:1]
    for i, count in enumerate(layers):
        yield replace(
            usual,
            layers=count,
            context=tuple(request.context) or context,
            prefill=tuple(request.tokens) or prefill,
            ways=model.known_ways(request.baselines),
            overhead=overhead if i == 0 and request.device == "cpu" else (),
            tiny=request.quick,
        )


def _units(plan: model.ModelPlan, where: dict[str, Any], loaded: model.Loaded) -> Iterator[Part]:
    for what, size, measure in model.units(plan, loaded):

        def part(document: dict[str, Any], what=what, size=size, measure=measure) -> None:
            if where["threads"]:
                torch.set_num_threads(where["threads"])
            try:
                found = measure()
            except (RuntimeError, MemoryError) as error:  # one part's failure is a finding, not the end
                found = {"error": str(error)[:160]}
            document["models"].append({**found, **where, "what": what, "size": size})

        yield _key(MODEL, what, size, *where.values()), part


def _key(*parts: Any) -> str:
    return "; ".join(map(str, parts))
