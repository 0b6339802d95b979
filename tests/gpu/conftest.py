"""Tests on a GPU: skipped with the reason where there is none, and seeded anew at each run."""

import os
import secrets

import pytest
import torch

SEED = os.environ.setdefault("DSOPT_SEED", str(secrets.randbits(31)))  # workers inherit it


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent.name == "gpu"]
    for item in here:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"PyTorch {torch.__version__} finds no GPU"))


@pytest.fixture(autouse=True)
def fresh(seed):
    """Random numbers that no run before had; a failure shows how to repeat them."""
    torch.manual_seed(torch.initial_seed() ^ int(SEED))
    print(f"DSOPT_SEED={SEED}")
