"""What loading and saving take of memory, by what Linux counts as resident."""

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import preset

import dsopt
from dsopt.models import presets

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class Resident:
    """Bytes of this process in memory: now, and at the most since this was made."""

    def __init__(self):
        gc.collect()
        # what was freed is given back to the system, so that it is not taken for what is free again
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            pytest.skip(f"the highest resident size cannot be reset: {error}")
        self.before = self._read("VmRSS")

    def _read(self, name: str) -> int:
        (line,) = (
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
        )
        return int(line.split()[1]) * 1024

    @property
    def now(self) -> int:
        return self._read("VmRSS") - self.before

    @property
    def highest(self) -> int:
        return self._read("VmHWM") - self.before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 MB in three files: two tables of 32 MB, and experts in stacks of 10 and 20 MB, one by one."""
    wide = {"vocab_size": 1 << 17, "hidden_size": 128, "moe_intermediate_size": 5 << 10}
    folder = tmp_path_factory.mktemp("folder")
    model = presets.random_model(presets.config(preset(**wide)))
    dsopt.save(model, folder / "checkpoint", max_shard_size="40MB")
    return folder / "checkpoint"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_load(folder):
    resident = Resident()
    model = dsopt.load(folder)
    assert resident.now >= 0.95 * size_of(folder)
    assert resident.highest <= 1.2 * size_of(folder)
    del model


def test_load_of_a_wider_dtype(folder):
    """What is widened on the way is not there in both widths."""
    resident = Resident()
    model = dsopt.load(folder, dtype=torch.float32)
    assert resident.now >= 1.9 * size_of(folder)
    assert resident.highest <= 2.2 * size_of(folder)
    del model


def test_save(folder, tmp_path):
    model = dsopt.load(folder)
    resident = Resident()
    dsopt.save(model, tmp_path / "again")
    assert resident.highest <= 0.1 * size_of(folder)
    assert size_of(tmp_path / "again") >= 0.99 * size_of(folder)
