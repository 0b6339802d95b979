"""CONTRIBUTING.md, tried literally: its files are written into a copy of the checkout and its commands run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsopt

ROOT = Path(dsopt.__file__).resolve().parents[1]
TEXT = ROOT / "CONTRIBUTING.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TEXT.is_file(), reason="dsopt is installed without its sources"),
]
PARTS = ("kernels", "passes", "models")


class Checkout:
    """A copy of the checkout whose commands import dsopt from the copy and install into a folder beside it."""

    def __init__(self, folder: Path):
        self.tree, self.site = folder / "tree", folder / "site"
        for part in ("dsopt", *PARTS, "tests"):
            shutil.copytree(
                ROOT / part, self.tree / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", self.tree)
        (self.tree / ".venv").symlink_to(sys.prefix)
        self.site.mkdir()
        (self.site / "dsopt").symlink_to(self.tree / "dsopt")
        for part in PARTS:
            (self.tree / "dsopt" / part).symlink_to(self.tree / part)

    def run(self, command: str) -> str:
        """What a command prints; it must succeed."""
        pip = {"PIP_TARGET": str(self.site), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        env = os.environ | pip | {"PYTHONPATH": str(self.site), "COLUMNS": "200"}
        done = subprocess.run(
            command, shell=True, cwd=self.tree, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def follow(self, title: str) -> list[str]:
        """Writes the files of one section of the text, then runs its commands; what each printed."""
        section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT.read_text(), re.M | re.S)[1]
        printed = []
        for language, block in re.findall(r"```(\w+)\n(.*?)```", section, re.S):
            if language == "sh":
                printed += [self.run(line) for line in block.splitlines()]
                continue
            path = self.tree / re.match(r"# (\S+)\n", block)[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
        return printed


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_add_a_kernel(checkout):
    (checkout.tree / "kernels" / "mine").mkdir()
    (checkout.tree / "kernels" / "mine" / "__init__.py").touch()
    tested, listed = checkout.follow("Add a kernel")
    assert re.search(r"\d\d passed", tested) and "failed" not in tested
    first = next(line for line in listed.splitlines() if ".rms_norm" in line)
    assert "mine.rms_norm" in first, "the highest priority is tried first"
    assert re.search(r"accepts \d+ of \d+, else: needs a width", first)


def test_add_a_pass(checkout):
    pipeline = checkout.tree / "dsopt" / "pipeline.py"
    text = pipeline.read_text()
    assert text.count("PIPELINE = (\n") == 1
    pipeline.write_text(text.replace("PIPELINE = (\n", 'PIPELINE = (\n    "turn_differences",\n'))
    (tested,) = checkout.follow("Add a pass")
    assert "2 passed" in tested
    code = "import torch, dsopt.testing as t; x = torch.ones(2); r = t.rewritten(lambda x: -(x - x * 2), x)"
    check = "print(r.log('turn_differences').rewrites, r.ops())"
    printed = checkout.run(f'.venv/bin/python -c "{code}; {check}"')
    assert printed.splitlines()[-1] == "1 ['aten.mul', 'aten.sub']"


def test_add_a_backend(checkout):
    _, checked, listed = checkout.follow("Add a backend from a package of your own")
    assert re.fullmatch(r"acme\.rms_norm agrees with the reference in \d\d+ calls\n", checked)
    assert "acme.rms_norm" in listed
    code = (
        "import torch, dsopt; m = torch.nn.Sequential(torch.nn.RMSNorm(8, eps=1e-6)); "
        "f = torch.compile(m, backend='dsopt', options={'kernels': {'rms_norm': 'acme'}}); "
        "torch.set_grad_enabled(False); f(torch.ones(2, 8)); print(dsopt.report(m).to_dict()['graphs'][0]['kernels'])"
    )
    assert "'backend': 'acme'" in checkout.run(f'.venv/bin/python -c "{code}"')
