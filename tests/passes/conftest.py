import pytest


@pytest.fixture(autouse=True)
def every_test(fresh_dynamo):
    """Passes are tested on small functions, each compiled many times."""
