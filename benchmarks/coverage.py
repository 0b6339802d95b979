"""How much of every latent-attention and expert family of transformers dsopt matches, and how exactly it computes.

    python benchmarks/coverage.py                            all families not measured before with these versions
    python benchmarks/coverage.py --only mixtral --again     some of them, again

Each family's text model is built at tiny geometry with random weights (`dsopt.models.families`) and runs a prompt
of 9 tokens and decode steps on its default cache, eager and compiled, in a process of its own:

    float32     two steps, a few experts and tokens chosen; relative L2 distance of the outputs from eager's
    bfloat16    one step, all of them chosen, so that no rounding can choose others; distance from a float64 run
                beside eager's

Results go to `benchmarks/results/coverage.json`, the table made of them to `docs/coverage.md`.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
import resource
import signal
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import dsopt
from dsopt.capture import graph_breaks
from dsopt.census import FAMILIES
from dsopt.files import write_text
from dsopt.models.families import Family, build, families, in_bfloat16, tiny
from dsopt.numerics import relative_l2

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TABLE = ROOT / "docs" / "coverage.md"
PROMPT, STEPS = 9, 2
# what a float32 run may differ from eager, and a bfloat16 run from 1.5 times eager's own error
FLOAT32_ERROR, BFLOAT16_SLACK = 1e-5, 1e-3


def outputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, or last hidden states, of a prompt and of decode steps that go on from its cache."""
    got, cache = [], None
    for piece in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        if (cache := getattr(out, "past_key_values", None)) is None:
            raise ValueError("keeps no cache: no causal model")
        got.append((out.logits if "logits" in out else out.last_hidden_state).clone())
    return got


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest relative L2 distance among the calls."""
    return max(relative_l2(a, b) for a, b in zip(got, want, strict=True))


def compiled(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The outputs through dsopt, and what it did. What it leaves alone runs eager: Inductor is not measured here."""
    torch._dynamo.reset()
    fast = dsopt.compile(model, fallback="eager")
    got = outputs(fast, ids)
    report = dsopt.report()
    misses = Counter(
        (miss.get("family", log.family) or log.name, _without_names(miss["reason"]))
        for graph in report.graphs
        for log in graph.passes
        for miss in log.misses
    )
    return got, {
        "graphs": len(report.graphs),
        "breaks": graph_breaks(),
        "fallbacks": sorted({g.fallback for g in report.graphs if g.fallback}),
        "matched": report.matched,
        "misses": [{"family": f, "reason": r, "count": n} for (f, r), n in misses.most_common()],
        "kernels": sorted({k.kernel for g in report.graphs for k in g.kernels}),
    }


def _without_names(reason: str) -> str:
    """A reason without the names of nodes, which differ from site to site."""
    return re.sub(r"\b[a-z_]+_\d+\b", "a node", reason)


@torch.inference_mode()
def measure(family: Family) -> dict[str, Any]:
    """Everything the table says about one family; "reason" is there if it could not be built."""
    torch.manual_seed(0)
    try:
        config = tiny(family)
        model = build(config)
        ids = torch.randint(3, 120, (1, PROMPT + STEPS))
        eager = outputs(model, ids)
    except Exception as error:  # whatever a family's code raises is a line of the table
        return {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}
    got, float32 = compiled(model, ids)
    float32["error"] = distance(got, eager)

    # the second step would compile one more graph of the same kind
    ids = ids[:, : PROMPT + 1]
    model = build(tiny(family, choose_all=True))
    truth, of = most_exact(model, ids)
    model = in_bfloat16(model)
    own = distance(outputs(model, ids), truth)
    got, bfloat16 = compiled(model, ids)
    bfloat16 |= {"error": distance(got, truth), "error_of_eager": own, "truth": of}
    return {
        "model": type(model).__name__,
        "layers": config.num_hidden_layers,
        "float32": float32,
        "bfloat16": bfloat16,
    }


def most_exact(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], str]:
    """The outputs in float64, or in float32 where the model's code holds to that; and which of them.

    Experts are computed one by one: grouped GEMMs have no float64.
    """
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")
    try:
        return outputs(wide, ids), "float64"
    except RuntimeError:
        return outputs(model, ids), "float32"


def _worker(family: Family, seconds: int, gigabytes: int, pipe: Any) -> None:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    # of the processor's time: on a shared machine the clock says little
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    start = time.process_time()
    try:
        result = measure(family)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {str(error).strip()}"[:2000]}
    pipe.send({**result, "seconds": round(time.process_time() - start, 1)})


def apart(family: Family, seconds: int, gigabytes: int) -> dict[str, Any]:
    """`measure` in a process of its own, which may take so much processor time and memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(family, seconds, gigabytes, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"failed": f"took more than {seconds} s of processor time, or was killed"}
        return {"failed": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def versions() -> dict[str, str]:
    """What a result is of."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {**packages, "dsopt": dsopt.__version__}


def matched(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(matched, total) by site family, over the graphs of both dtypes; of the families counted when it was made."""
    runs = [result[dtype]["matched"] for dtype in ("float32", "bfloat16")]
    return {f: (sum(r[f][0] for r in runs), sum(r[f][1] for r in runs)) for f in runs[0]}


def wrong(result: dict[str, Any]) -> str:
    """What a family's outputs are wrong by, or ""."""
    if not result["float32"]["error"] <= FLOAT32_ERROR:
        return f"float32 error {result['float32']['error']:.1e}"
    bfloat16 = result["bfloat16"]
    if not bfloat16["error"] <= 1.5 * bfloat16["error_of_eager"] + BFLOAT16_SLACK:
        return f"bfloat16 error {bfloat16['error']:.1e}, eager {bfloat16['error_of_eager']:.1e}"
    return ""


def failures(result: dict[str, Any]) -> list[str]:
    """Why passes were left out, which no model should bring about."""
    misses = [m for dtype in ("float32", "bfloat16") for m in result[dtype]["misses"]]
    return list(dict.fromkeys(m["reason"] for m in misses if m["reason"].startswith("left out, it failed")))


def is_full(result: dict[str, Any], kind: str) -> bool:
    """True when every site is matched, some of `kind` (mla, moe) among them, without a graph break or an error."""
    if "float32" not in result or wrong(result):
        return False
    runs = result["float32"], result["bfloat16"]
    sites = matched(result)
    whole = not failures(result) and not any(run["breaks"] or run["fallbacks"] for run in runs)
    return whole and sites[kind][1] > 0 and all(a == b for a, b in sites.values())


def why_not(result: dict[str, Any]) -> list[str]:
    """Reasons for what is missed or wrong, in the words of the passes."""
    lines = [f"**wrong**: {wrong(result)}"] if wrong(result) else []
    runs = result["float32"], result["bfloat16"]
    for reason in dict.fromkeys(r for run in runs for r in run["fallbacks"]):
        lines.append(f"fallback: {reason}")
    for reason in dict.fromkeys(r for run in runs for r in run["breaks"]):
        lines.append(f"graph break: {reason}")
    for reason in failures(result):
        lines.append(f"failed pass: {reason}")
    for family, (hits, total) in matched(result).items():
        if hits < total:
            reasons = [m["reason"] for run in runs for m in run["misses"] if m["family"] == family]
            lines.append(f"{family}: {'; '.join(dict.fromkeys(reasons)) or 'no reason given'}")
    return lines


def document(results: dict[str, Any]) -> str:
    """`docs/coverage.md` from the results."""
    rows = results["families"]
    built = {name: r for name, r in rows.items() if "float32" in r}
    count = {
        kind: (sum(is_full(r, kind) for r in of.values()), len(of))
        for kind, of in (
            ("mla", {n: r for n, r in rows.items() if r["has_latent"]}),
            ("moe", {n: r for n, r in rows.items() if r["has_experts"]}),
        )
    }
    its = results["versions"]
    counted = list(matched(next(iter(built.values())))) if built else FAMILIES
    lines = [
        "# Coverage of transformers' families",
        "",
        f"transformers {its['transformers']}, PyTorch {its['torch']}, dsopt {its['dsopt']}. Made by "
        "`python benchmarks/coverage.py`, from `benchmarks/results/coverage.json`.",
        "",
        "Every family whose modeling file has latent attention or experts: its text model at tiny geometry with random",
        "weights, compiled by `dsopt.compile`, runs a prompt of 9 tokens and decode steps on its default cache, in",
        "float32 (8 experts, a few chosen; two steps) and in bfloat16 (all chosen; one step). Sites are *matched of",
        "all*, summed over the graphs of both runs; all are counted without the passes. The float32 error is the",
        "relative L2 distance from eager, the bfloat16 error that from a float64 run, with its ratio to eager's own;",
        "where a model's code does not run in float64, that run is in float32.",
        "",
        f"- latent attention: {count['mla'][0]} of {count['mla'][1]} families fully matched",
        f"- experts: {count['moe'][0]} of {count['moe'][1]} families fully matched",
        f"- built: {len(built)} of {len(rows)}; wrong: {sum(bool(wrong(r)) for r in built.values())}",
        "",
        f"| family | {' | '.join(counted)} | graphs | error fp32 | error bf16 | why not |",
        "|---" * (len(counted) + 5) + "|",
        *(_row(name, result) for name, result in built.items()),
        "",
        "Not measured:",
        "",
        *(
            f"- `{n}`: {r.get('reason') or r['failed'].splitlines()[0]}"
            for n, r in rows.items()
            if n not in built
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any]) -> str:
    sites = (f"{a}/{b}" if b else "-" for a, b in matched(result).values())
    float32, bfloat16 = result["float32"], result["bfloat16"]
    ratio = bfloat16["error"] / (bfloat16["error_of_eager"] or 1)
    figures = (
        f"{float32['graphs']} + {bfloat16['graphs']}",
        f"{float32['error']:.1e}",
        f"{bfloat16['error']:.1e} ({ratio:.2f}x)",
        "<br>".join(line.replace("|", "\\|") for line in why_not(result)),
    )
    return f"| {' | '.join((name, *sites, *figures))} |"


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="This family (repeatable).")] = None,
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where results go.")] = RESULTS,
    table: Annotated[Path, typer.Option(metavar="FILE", help="Where the table goes.")] = TABLE,
    seconds: Annotated[int, typer.Option(min=1, help="Processor time a family may take.")] = 200,
    gigabytes: Annotated[int, typer.Option(min=1, help="Limit of a family's address space.")] = 16,
    again: Annotated[bool, typer.Option(help="Measure also what was measured before.")] = False,
) -> None:
    """Measure every latent-attention and expert family of transformers, and write the table."""
    found = families()
    if unknown := set(only or ()) - {f.name for f in found}:
        raise typer.BadParameter(f"unknown families {sorted(unknown)}; known: {[f.name for f in found]}")
    results = {"versions": versions(), "families": {}}
    if json_file.exists() and (old := json.loads(json_file.read_text()))["versions"] == results["versions"]:
        results = old
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(found))
        for family in found:
            progress.update(task, description=family.name)
            is_done = "failed" not in results["families"].get(family.name, {"failed": "not measured"})
            if (not only or family.name in only) and (again or not is_done):
                result = apart(family, seconds, gigabytes)
                results["families"][family.name] = {
                    "has_latent": family.has_latent,
                    "has_experts": family.has_experts,
                    **result,
                }
                console.print(_line(family.name, result), highlight=False, markup=False)
                results["families"] = dict(sorted(results["families"].items()))
                json_file.parent.mkdir(parents=True, exist_ok=True)
                write_text(json_file, json.dumps(results, indent=1) + "\n")
            progress.advance(task)
    table.parent.mkdir(parents=True, exist_ok=True)
    write_text(table, document(results))


def _line(name: str, result: dict[str, Any]) -> str:
    if "float32" not in result:
        return f"{name}: {result.get('reason') or result['failed'].splitlines()[0]}"
    sites = " ".join(f"{f} {a}/{b}" for f, (a, b) in matched(result).items() if b)
    notes = "; ".join(why_not(result))
    return f"{name}: {sites}; {result['float32']['error']:.1e}; {result['seconds']} s{'; ' + notes if notes else ''}"


if __name__ == "__main__":
    typer.run(main)
