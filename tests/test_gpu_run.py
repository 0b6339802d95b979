"""`make gpu`: what its table and exit code say, and that a part which takes too long is ended."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture
def gpu_run(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path)
    return module


def test_the_exit_code_tells_failed_from_not_run(gpu_run, capsys):
    good, bad = gpu_run.Part("set-up", "passed"), gpu_run.Part("cpu side", "failed", passed=7, failed=1)
    absent = gpu_run.Part("gpu", "not run", "PyTorch finds no GPU")
    assert gpu_run.show([good]) == 0
    assert gpu_run.show([good, absent]) == 2
    assert "gpu was not run: PyTorch finds no GPU" in capsys.readouterr().out
    assert gpu_run.show([good, absent, bad]) == 1
    assert gpu_run.main(["all"]) == 1
    assert "PART is one of tests, ops, moe, attn, model, sanitize, got 'all'" in capsys.readouterr().err


def test_a_sanitizer_that_does_not_run_is_no_failure(gpu_run, monkeypatch):
    monkeypatch.setattr(gpu_run, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_run, "setup", lambda: gpu_run.Part("set-up", "passed"))
    monkeypatch.setattr(gpu_run, "SANITIZER", ("no-such-sanitizer",))
    parts = gpu_run.sanitize()
    assert parts[1].note == "no-such-sanitizer is not on the PATH" and gpu_run.show(parts) == 0
    monkeypatch.setattr(
        gpu_run, "SANITIZER", (sys.executable, "-c", "raise SystemExit('Device not supported')")
    )
    parts = gpu_run.sanitize()
    assert parts[1].status == "not run" and parts[1].note.endswith("does not run here: Device not supported")


def test_pytest_is_counted_and_ended_in_time(gpu_run, tmp_path):
    file = tmp_path / "test_three.py"
    file.write_text("""
import pytest, time
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
def test_long(): time.sleep(SECONDS)
""")
    arguments = [str(file), "-p", "no:cacheprovider", "-c", "/dev/null"]
    file.write_text(file.read_text().replace("SECONDS", "0"))
    part = gpu_run.pytest("three", 120, arguments)
    assert (part.status, part.passed, part.failed, part.skipped, part.note) == ("failed", 2, 1, 1, "")
    file.write_text("import time\ndef test_long(): time.sleep(100)\n")
    part = gpu_run.pytest("three", 5, arguments)
    assert (part.status, part.note) == ("failed", "stopped after 5 s")
