"""What kernels are measured against: the op's reference, PyTorch as a user writes it, Inductor, installed peers.

A baseline is asked for the callable that computes a case, and raises `Absent` with the reason where it has none.
Another package adds its own under the entry-point group `dsopt.baselines`: an object that is a `Baseline`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from dsopt.bench.absent import Absent
from dsopt.bench.cases import Case
from dsopt.bench.eager import EAGER
from dsopt.bench.moe_peers import kt_experts, zentorch_experts

ENTRY_POINT_GROUP = "dsopt.baselines"
PEERS = "peers"


@dataclass(frozen=True)
class Baseline:
    """A way to compute ops that is not a kernel of dsopt.

    name: what tables call it.
    build: `build(case, args)` returns `fn(*args)`, or raises Absent.
    ops: those it is asked for; None for all.
    column: the column of ratios it belongs to: its own, or that of all peers, which takes the best of them.
    """

    name: str
    build: Callable[[Case, tuple], Callable]
    ops: frozenset[str] | None = None
    column: str = PEERS


def _reference(case: Case, args: tuple) -> Callable:
    if EAGER.get(case.op.name) is case.op.reference:
        raise Absent("the same as eager for this op")
    return case.op.reference


def _eager(case: Case, args: tuple) -> Callable:
    if case.op.name not in EAGER:
        raise Absent("nobody wrote this op in plain PyTorch yet: dsopt/bench/eager.py")
    return EAGER[case.op.name]


def _inductor(case: Case, args: tuple) -> Callable:
    return torch.compile(_eager(case, args), dynamic=False)


def _transformers(how: str) -> Callable[[Case, tuple], Callable]:
    """transformers' own experts on the case's weights."""

    def build(case: Case, args: tuple) -> Callable:
        try:
            from transformers import DeepseekV2Config
            from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
        except ImportError as error:
            raise Absent(f"transformers is not installed, or too old: {error}") from error
        x, ids, _, w13, w2 = args[:5]
        if how == "batched_mm" and ids.numel() > 4 * ids.shape[1]:
            raise Absent("it copies the weights of every choice: for four tokens at most")
        experts, _, hidden = w13.shape
        config = DeepseekV2Config(
            hidden_size=hidden, moe_intermediate_size=w2.shape[2], n_routed_experts=experts
        )
        with torch.device("meta"):
            module = DeepseekV2Experts(config).to(x.dtype)
        module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w, False) for w in (w13, w2))
        module.config._experts_implementation = how
        return lambda x, ids, weights, *_: module(x, ids, weights)

    return build


BASELINES = (
    Baseline("reference", _reference, column="reference"),
    Baseline("eager", _eager, column="eager"),
    Baseline("inductor", _inductor, column="inductor"),
    *(
        Baseline(f"transformers {how}", _transformers(how), frozenset({"moe_experts"}))
        for how in ("eager", "grouped_mm", "batched_mm")
    ),
    Baseline("zentorch", zentorch_experts, frozenset({"moe_experts"})),
    Baseline("kt-kernel AMX", kt_experts("AMXBF16_MOE"), frozenset({"moe_experts"})),
    Baseline("kt-kernel AVX2", kt_experts("AVX2BF16_MOE"), frozenset({"moe_experts"})),
)


def baselines() -> tuple[tuple[Baseline, ...], tuple[tuple[str, str], ...]]:
    """Every baseline, and (name, reason) of those of other packages that do not load."""
    found, broken = list(BASELINES), []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            found.append(entry.load())
        except Exception as error:  # a broken package is a line below the table, not the end of the run
            broken.append((entry.name, f"import failed: {type(error).__name__}: {error}"))
    return tuple(found), tuple(broken)
