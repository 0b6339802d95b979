"""The tree as users meet it: import names, what an install ships, and the entry points."""

import importlib
import importlib.util
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import dsopt

ROOT = Path(dsopt.__file__).resolve().parents[1]
PARTS = ("passes", "kernels", "models")
in_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="dsopt is installed without its sources"
)


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_parts_import_under_dsopt():
    for part in PARTS:
        assert importlib.import_module(f"dsopt.{part}").__name__ == f"dsopt.{part}"
    assert importlib.import_module("dsopt.kernels.torch.rms_norm").__name__ == "dsopt.kernels.torch.rms_norm"


@pytest.mark.parametrize("name", [*PARTS, "benchmarks"])
def test_parts_are_not_importable_by_their_own_name(name):
    spec = importlib.util.find_spec(name)
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


@in_checkout
def test_parts_have_empty_init_files():
    for part in PARTS:
        assert (ROOT / part / "__init__.py").read_text() == ""


def test_backend_is_found_without_importing_dsopt(tmp_path):
    code = """
import sys, torch
assert "dsopt" not in sys.modules
norm = torch.nn.RMSNorm(16, eps=1e-6)
x = torch.randn(2, 16)
with torch.inference_mode():
    y = torch.compile(norm, backend="dsopt")(x)
    torch.testing.assert_close(y, norm(x))
assert "dsopt" in sys.modules
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_entry_points_are_declared():
    (backend,) = entry_points(group="torch_dynamo_backends", name="dsopt")
    assert backend.load() is importlib.import_module("dsopt.backend").dsopt_backend
    (command,) = entry_points(group="console_scripts", name="dsopt")
    assert command.value == "dsopt.cli:main"


def test_import_needs_no_transformers(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import dsopt, dsopt.cli; dsopt.report()"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@in_checkout
@pytest.mark.slow
def test_wheel_holds_exactly_the_tree(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    # a copy, because building leaves folders in the tree it builds from
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [*command, "-w", tmp_path / "out", tmp_path / "tree"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("dsopt-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n for n in names if n.endswith(".py")}
    sources = {f"dsopt/{n}" for n in tracked.stdout.splitlines() if n.startswith(PARTS) and n.endswith(".py")}
    sources |= {n for n in tracked.stdout.splitlines() if n.startswith("dsopt/") and n.endswith(".py")}
    assert shipped == sources
    trained = {f"dsopt/{n}" for n in tracked.stdout.splitlines() if n.startswith("models/tiny_checkpoint/")}
    assert trained and trained <= set(names)
