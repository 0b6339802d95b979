"""One run of the benchmarks: what was asked for, what is done, and the document that holds the results.

The document is plain data: `started`, `seconds`, `machine`, `ceilings`, `rows` and `problems` of ops (see
`dsopt.bench.run`), `models` and `overhead`. It is saved after each case, so an interrupt or a crash keeps what was
finished, and a later run can go on from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


def _op_parts(request: Request, limits: ceilings.Ceilings, step: Steps) -> Iterator[Part]:
    for preset in request.presets:
        for dtype in request.dtypes:
            for threads in request.thread_counts:
                where = {"preset": preset, "dtype": dtype, "device": request.device, "threads": threads}
                for name in [op for op in request.ops if op != MODEL]:
                    geo = geometry(preset, DTYPES[dtype], request.device, request.quick)
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
    ways = model.known_ways(request.baselines)
    defaults = model.ModelPlan("", 0)
    for preset in request.presets:
        for dtype in request.dtypes:
            for threads in request.thread_counts:
                for i, layers in enumerate(request.layers or (3,)):
                    plan = model.ModelPlan(
                        preset,
                        layers,
                        dtype,
                        request.device,
                        request.context or ((16,) if request.quick else defaults.context),
                        request.tokens or ((5,) if request.quick else defaults.prefill),
                        ways,
                        () if i else _overhead_layers(request),
                        request.quick,
                    )
                    where = {"preset": preset, "layers": layers, "dtype": dtype}
                    where |= {"device": request.device, "threads": threads, "tiny": request.quick}
                    yield from _units(plan, where, loaded)


def _overhead_layers(request: Request) -> Sequence[int]:
    if request.device != "cpu":
        return ()
    return (request.layers or (3,))[:1] if request.quick else model.ModelPlan("", 0).overhead


def _units(plan: model.ModelPlan, where: dict[str, Any], loaded: model.Loaded) -> Iterator[Part]:
    for what, size, measure in model.units(plan, loaded):

        def part(document: dict[str, Any], what=what, size=size, measure=measure) -> None:
            if where["threads"]:
                torch.set_num_threads(where["threads"])
            try:
                found = measure()
            except RuntimeError as error:
                found = {"error": str(error)[:160]}
            document["models"].append({**where, "what": what, "size": size, **found})

        yield _key(MODEL, what, size, *where.values()), part


def _key(*parts: Any) -> str:
    return "; ".join(map(str, parts))
