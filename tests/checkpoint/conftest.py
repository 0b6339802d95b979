import pytest

pytest.importorskip("transformers", minversion="5.17")
