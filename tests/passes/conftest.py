import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Compiled code of one test does not count against another's recompile limit."""
    torch._dynamo.reset()
