"""`make gpu` and `make gpu-bench PART=...`: sets up, runs, and ends with a short table. Works without a network.

Usage: run.py [tests|ops|moe|attn|model|sanitize]

`tests` installs this checkout into the interpreter that runs it, then runs the tests that need a GPU and, with GPUs
hidden, those of the CPU side under this machine's versions. The others measure, or run compute-sanitizer; a part that
was cut short goes on where it ended when it is run again. What is written goes to the folder $OUT, or build/gpu.
Exit code: 0 if all is well, 1 if something failed, 2 if there is no GPU and nothing else failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
# of 8 minutes, what the set-up leaves
GPU_SECONDS, CPU_SECONDS, BENCH_SECONDS = 210, 210, 440
CPU_TESTS = ("capture", "census", "effects", "backend", "prepare", "report", "interpreter")
CPU_FOLDERS = ("passes", "ops", "kernels", "models")
BENCHES = {
    "ops": ("run.py", "--op", "rms_norm,add_rms_norm,rope,moe_route,multi_linear,gated_mlp"),
    "moe": ("bench_moe.py",),
    "attn": ("bench_attention.py",),
    "model": ("bench_model.py", "--layers", "4"),
}
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")


@dataclass
class Part:
    """How one part went. status: passed, failed, or not run with the reason in note."""

    name: str
    status: str
    note: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def run(command: list[str], limit: float, **env: str) -> int | None:
    """Exit code of a command that is interrupted after `limit` seconds, as by Ctrl-C; None if that had to be done."""
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, start_new_session=True)
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def setup() -> Part:
    """This checkout, editable, in the interpreter's site-packages, or in build/user where they cannot be written.

    Nothing is done if that was done before and no source of the build has changed.
    """
    start = time.monotonic()
    user = not os.access(sysconfig.get_path("purelib"), os.W_OK)
    if user:
        os.environ["PYTHONUSERBASE"] = str(ROOT / "build" / "user")
    stamp = ROOT / "build" / "gpu-installed"
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*")]
    newest = max(source.stat().st_mtime for source in sources)
    if stamp.is_file() and stamp.read_text() == sys.prefix and stamp.stat().st_mtime > newest:
        return Part("set-up", "passed", "as it was")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    command += ["--user", "--break-system-packages"] if user else []
    code = subprocess.run([*command, "--editable", "."], cwd=ROOT).returncode
    if code == 0:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(sys.prefix)
    return Part("set-up", "failed" if code else "passed", seconds=time.monotonic() - start)


def no_gpu() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    why = "has no CUDA" if torch.version.cuda is None else "finds no GPU"
    return f"PyTorch {torch.__version__} {why}"


def pytest(name: str, limit: float, arguments: list[str], prefix: tuple[str, ...] = (), **env: str) -> Part:
    """Runs pytest in a process of its own, on several where pytest-xdist is there, and counts."""
    report = OUT / f"{name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    command = [*prefix, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    if not prefix and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(12, os.cpu_count() - 2))), "--dist", "worksteal"]
    start = time.monotonic()
    code = run(command, limit, OMP_NUM_THREADS="1", **env)
    part = Part(name, "passed" if code == 0 else "failed", seconds=time.monotonic() - start)
    if code is None:
        part.note = f"stopped after {limit} s"
    elif code not in (0, 1):
        part.note = f"pytest ended with {code}"
    if report.is_file():
        for suite in ElementTree.parse(report).iter("testsuite"):
            count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            part.failed += count["failures"] + count["errors"]
            part.skipped += count["skipped"]
            part.passed += count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    return part


def tests() -> list[Part]:
    """Set-up, tests on the GPU with fresh random numbers, tests of the CPU side."""
    parts = [setup()]
    if parts[0].status == "failed":
        return parts
    if reason := no_gpu():
        parts.append(Part("gpu", "not run", reason))
    else:
        parts.append(pytest("gpu", GPU_SECONDS, ["tests/gpu", "-m", "gpu"], DSOPT_SEED=seed()))
    paths = [f"tests/test_{name}.py" for name in CPU_TESTS] + [f"tests/{name}" for name in CPU_FOLDERS]
    parts.append(pytest("cpu side", CPU_SECONDS, paths, CUDA_VISIBLE_DEVICES=""))
    return parts


def seed() -> str:
    chosen = os.environ.get("DSOPT_SEED") or str(secrets.randbits(31))
    print(f"DSOPT_SEED={chosen} repeats these random numbers", flush=True)
    return chosen


def bench(name: str) -> list[Part]:
    """One part of the benchmarks, into a JSON file that the next run goes on with."""
    first = setup()
    if first.status == "failed":
        return [first]
    if reason := no_gpu():
        return [first, Part(name, "not run", reason)]
    script, *arguments = BENCHES[name]
    file = OUT / f"bench-{name}.json"
    command = [sys.executable, f"benchmarks/{script}", *arguments, "--json", str(file), "--resume"]
    start = time.monotonic()
    code = run(command, BENCH_SECONDS)
    cut = code in (None, 130)
    note = f"cut short; run it again to go on with {file}" if cut else str(file)
    return [
        first,
        Part(name, "passed" if code == 0 or cut else "failed", note, seconds=time.monotonic() - start),
    ]


def sanitize() -> list[Part]:
    """The GPU tests of samples under compute-sanitizer, where that exists and takes the device."""
    first = setup()
    if first.status == "failed":
        return [first]
    if reason := no_gpu():
        return [first, Part("sanitize", "not run", reason)]
    if shutil.which(SANITIZER[0]) is None:
        return [first, Part("sanitize", "not run", f"{SANITIZER[0]} is not on the PATH")]
    probe = "import torch; print(torch.ones(8, device='cuda').sum().item())"
    done = subprocess.run([*SANITIZER, sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return [
            first,
            Part("sanitize", "not run", f"{SANITIZER[0]} does not run here: {said[0] if said else ''}"),
        ]
    chosen = ["tests/gpu", "-m", "gpu", "-k", "samples and triton and bfloat16"]
    # with PyTorch's cache of memory, reads beyond a tensor stay inside a block that is allocated
    return [
        first,
        pytest(
            "sanitize",
            BENCH_SECONDS,
            chosen,
            SANITIZER,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            DSOPT_SEED=seed(),
        ),
    ]


def show(parts: list[Part]) -> int:
    """Prints the table; the exit code."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "", "passed", "failed", "skipped", "seconds", "note")
    colors = {"passed": "green", "failed": "red", "not run": "yellow"}
    for part in parts:
        counts = (part.passed, part.failed, part.skipped)
        status = f"[{colors[part.status]}]{part.status}[/]"
        table.add_row(
            part.name,
            status,
            *(str(c) if any(counts) else "" for c in counts),
            f"{part.seconds:.0f}",
            part.note,
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if any(part.status == "failed" for part in parts):
        return 1
    if missing := next((p for p in parts if p.status == "not run"), None):
        print(f"{missing.name} was not run: {missing.note}")
        return 0 if missing.name == "sanitize" and no_gpu() is None else 2
    return 0


def main(given: list[str]) -> int:
    part = given[0] if given else "tests"
    known = ("tests", *BENCHES, "sanitize")
    if part not in known:
        print(f"PART is one of {', '.join(known)}, got {part!r}", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    return show(tests() if part == "tests" else sanitize() if part == "sanitize" else bench(part))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
