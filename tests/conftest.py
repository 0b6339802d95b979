"""What every test needs: the package under test found as a user finds it, and one seed per test."""

import sys
import zlib
from pathlib import Path

import pytest
import torch

import dsopt

ROOT = Path(dsopt.__file__).resolve().parents[1]

# a checkout's root ahead of site-packages would let its kernels/ folder pass for Hugging Face's `kernels`
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.fixture(autouse=True)
def seed(request):
    """The same random numbers for a test whatever ran before it, and others for another test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def no_graph_cache():
    """What a test sees was made in it; those of the cache itself give it a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSOPT_CACHE", "0")
        yield


@pytest.fixture
def fresh_dynamo():
    """Compiled code of one test does not count against another's recompile limit."""
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
