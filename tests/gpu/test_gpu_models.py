"""Whole models of transformers on a GPU: compiled by dsopt they compute what eager does, on Triton kernels."""

import copy

import pytest
import torch
from families import build

import dsopt


@pytest.fixture(autouse=True)
def every_test(fresh_dynamo):
    """Models of one class share its code, and with it Dynamo's recompile limit."""


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_logits_and_tokens_are_eagers(family):
    model = build(family).cuda()
    eager = copy.deepcopy(model)
    model.compile(backend="dsopt")
    with torch.inference_mode():
        for tokens in (7, 12, 1):
            ids = torch.randint(3, 120, (2, tokens), device="cuda")
            got, want = model(ids).logits, eager(ids).logits
            assert (got - want).norm() <= 1e-4 * want.norm()
    prompt = torch.randint(3, 120, (1, 9), device="cuda")
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options), eager.generate(prompt, **options))
    report = dsopt.report(model)
    assert report.graphs and not report.fallbacks
    backends = {kernel.op: kernel.backend for graph in report.graphs for kernel in graph.kernels}
    assert {backends[op] for op in ("rms_norm", "add_rms_norm", "moe_route")} == {"triton"}


def test_bfloat16_is_as_near_to_float64_as_eager():
    model = build("v3", first_k_dense_replace=2).cuda()  # no router, whose near ties rounding decides
    truth = copy.deepcopy(model).double()
    model = model.bfloat16()
    eager = copy.deepcopy(model)
    model.compile(backend="dsopt")
    ids = torch.randint(3, 120, (2, 16), device="cuda")
    with torch.inference_mode():
        want = truth(ids).logits
        mine, eagers = (((m(ids).logits.double() - want).norm() / want.norm()).item() for m in (model, eager))
    assert mine <= 1.5 * eagers + 1e-3
