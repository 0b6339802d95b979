"""Kernels from packages outside the tree, found by their entry point in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ACME = Path(__file__).parent / "third_party" / "acme"

# a model, and what dsopt makes of it with some options
MODEL = """
import json, torch, dsopt
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner
from dsopt.cli import app
from dsopt.op import backends, kernels
from dsopt.ops import OPS

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((16, 24), (16, 24), (24, 16)))

    def forward(self, x):
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))

def used(**options):
    torch.compiler.reset()
    model, x = Model(), torch.randn(3, 16)
    fast = dsopt.compile(model, fallback="eager", **options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    report = dsopt.report(fast)
    uses = [k for g in report.graphs for k in g.kernels]
    return {
        "kernels": {k.op: k.kernel for k in uses},
        "refused": {r.kernel: r.reason for k in uses for r in k.refused},
        "fallbacks": report.fallbacks,
    }

def env():
    done = CliRunner().invoke(app, ["env", "--json", "-"])
    rows = json.loads(done.stdout)["kernels"] if done.exit_code == 0 else []
    verdicts = {r["kernel"] + " " + r["dtype"]: r["verdict"] for r in rows if r["device"] == "cpu"}
    return {"verdicts": verdicts, "exit_code": done.exit_code, "stderr": done.stderr}
"""


def facts(site: Path, code: str, cwd: Path) -> dict:
    """What `code`, which makes a dict `found`, finds in a fresh process that sees the packages of a folder too."""
    command = [sys.executable, "-c", f"{MODEL}\n{code}\nprint(json.dumps(found))"]
    variables = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    """A folder with the package as pip installs it; building leaves files, so that happens in a copy."""
    folder = tmp_path_factory.mktemp("acme")
    shutil.copytree(ACME, folder / "source")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def registered(site: Path, name: str, code: str) -> None:
    """A package of one module with an entry point, as an installer would leave it."""
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{name}.py").write_text(code)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dsopt.kernels]\n{name} = {name}\n")


def test_an_installed_package(acme, tmp_path):
    code = """
from dsopt.testing import check_kernel
mine = [k for op in OPS for k in kernels(op)[0] if k.backend == "acme"]
found = {
    "backends": backends(),
    "default": used()["kernels"],
    "asked": used(kernels={"gated_mlp": "acme", "rms_norm": "torch"})["kernels"],
    "checked": {k.label: check_kernel(k, dtypes=[torch.float32]) for k in mine},
    "env": env()["verdicts"],
}
"""
    found = facts(acme, code, tmp_path)
    assert "acme" in found["backends"]
    assert found["default"]["rms_norm"] == "acme.rms_norm", "by its priority"
    assert not found["default"]["gated_mlp"].startswith("acme."), "its priority is below all others"
    assert found["asked"]["gated_mlp"] == "acme.gated_mlp"
    assert found["asked"]["rms_norm"] == "torch.rms_norm"
    assert set(found["checked"]) == {"acme.rms_norm", "acme.gated_mlp"}
    assert all(calls > 20 for calls in found["checked"].values())
    assert found["env"]["acme.rms_norm bfloat16"] == "accepts"
    assert found["env"]["acme.gated_mlp bfloat16"] == "needs dtype float32, got bfloat16"


@pytest.mark.slow
def test_a_broken_package_is_a_reason(tmp_path):
    registered(tmp_path / "site", "broken", "import a_driver_that_is_not_there")
    kernel = "Kernel('rms_norm', 'elsewhere', lambda *_: None, priority=1000)"
    code = f"from dsopt.op import Kernel\nKERNELS = ({kernel},)\n"
    registered(tmp_path / "site", "misnamed", code)
    found = facts(tmp_path / "site", "found = {**used(), 'env': env()}", tmp_path)
    assert set(found["kernels"]) == {"rms_norm", "gated_mlp"} and found["fallbacks"] == []
    reason = "import failed: ModuleNotFoundError: No module named 'a_driver_that_is_not_there'"
    assert found["refused"]["broken.rms_norm"] == found["refused"]["broken.gated_mlp"] == reason
    assert found["refused"]["elsewhere.rms_norm"] == "backend elsewhere is registered under the name misnamed"
    assert found["env"]["exit_code"] == 0 and found["env"]["verdicts"]["broken.rope float32"] == reason


@pytest.mark.slow
def test_two_kernels_of_one_label_are_an_error_that_names_them(tmp_path):
    kernel = "Kernel('rms_norm', 'twice', lambda *_: None)"
    code = f"from dsopt.op import Kernel\nKERNELS = ({kernel}, {kernel})\n"
    registered(tmp_path / "site", "twice", code)
    reason = "two kernels of op rms_norm are called twice.rms_norm; give one of them another name"
    code = """
found = {"plain": used(), "env": env()}
try:
    used(strict=True)
except Exception as error:
    found["strict"] = str(error)
"""
    found = facts(tmp_path / "site", code, tmp_path)
    assert found["plain"]["kernels"] == {} and reason in found["plain"]["fallbacks"][0]
    assert reason in found["strict"]
    assert found["env"]["exit_code"] == 1 and reason in " ".join(found["env"]["stderr"].split())
