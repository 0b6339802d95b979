"""Other packages' experts are absent with a reason where they are not installed."""

import sys

import pytest
import torch

from dsopt.bench.absent import Absent
from dsopt.bench.moe_peers import kt_experts, zentorch_experts


@pytest.mark.parametrize(
    ("module", "build"), [("zentorch", zentorch_experts), ("kt_kernel", kt_experts("AVX2BF16_MOE"))]
)
def test_absent_where_not_installed(monkeypatch, module, build):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Absent, match="not installed"):
        build(None, ())


def test_zentorch_refuses_other_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "zentorch", object())
    x, ids = torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(Absent, match="bfloat16"):
        zentorch_experts(None, (x, ids, x, x, x))
