import pytest


@pytest.fixture(autouse=True)
def every_test(fresh_dynamo):
    """Models of one class share its code, and with it Dynamo's recompile limit."""
