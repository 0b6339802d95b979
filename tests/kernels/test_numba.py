"""What is special to the Numba kernels: rounding, threads, machine code, caches, and what they refuse."""

import importlib.util
import platform
import shutil

import pytest
import torch

from dsopt.op import explain, kernels
from dsopt.ops import OPS
from dsopt.testing import rand, relative_l2

numba = pytest.importorskip("numba")
dots, mla_attention, moe_experts, multi_linear, rms_norm, runtime = (
    pytest.importorskip(f"dsopt.kernels.numba.{name}")
    for name in ("dots", "mla_attention", "moe_experts", "multi_linear", "rms_norm", "runtime")
)
BFLOAT16 = torch.bfloat16


@numba.njit
def store_all(x, out):
    for i in range(x.size):
        runtime.store(out, i, runtime.widen(x[i]))


def test_bfloat16_is_widened_exactly_and_rounded_to_nearest_even():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BFLOAT16)
    wide = torch.empty(every.shape)
    store_all(runtime.flat(every), runtime.flat(wide))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # on, just below and just above the middle between neighbours, of every exponent and sign
    bits = every.view(torch.int16).to(torch.int32) << 16
    for low in (0x7FFF, 0x8000, 0x8001):
        x = (bits | low).view(torch.float32)
        out = torch.empty(x.shape, dtype=BFLOAT16)
        store_all(runtime.flat(x), runtime.flat(out))
        torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def attention_args(dtype):
    r = rand("cpu", dtype)
    seen = (torch.arange(700) < 600)[None, None, None]
    tensors = (r(2, 16, 2, 16), r(2, 16, 2, 8), r(2, 700, 32), r(2, 700, 8), r(16, 16, 32), r(16, 24, 32))
    return mla_attention.absorbed, (*tensors, seen, 0.2)


def experts_args(dtype):
    r = rand("cpu", dtype)
    ids = torch.tensor([[0, 3], [3, 1], [5, 3]])
    return moe_experts.moe_experts, (r(3, 64), ids, r(3, 2).float(), r(6, 144, 64), r(6, 40, 72))


@pytest.mark.skipif(runtime._most_threads() < 2, reason="this machine runs one thread")
@pytest.mark.parametrize("case", [attention_args, experts_args])
def test_results_do_not_depend_on_the_number_of_threads(case, threads):
    fn, args = case(BFLOAT16)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(fn(*args))
        assert torch.get_num_threads() == count
    assert torch.equal(*results)


def test_numbas_own_number_of_threads_is_left_as_it_was(threads):
    before = numba.get_num_threads()
    threads(1)
    fn, args = experts_args(BFLOAT16)
    fn(*args)
    assert numba.get_num_threads() == before


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="looks for x86 instructions"
)
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("fma3"), reason="this processor has no fused products"
)
def test_bfloat16_dots_are_vectors():
    w, x = runtime.flat(torch.ones(8 * 64, dtype=BFLOAT16)), runtime.flat(torch.ones(64))
    # compiled anew, since cached code cannot be looked at
    dots_8 = numba.njit(fastmath=runtime.FASTMATH, error_model="numpy")(dots._dots_8.py_func)
    assert dots_8(w, 0, 64, x, 0, 64) == (64.0,) * 8
    code = "\n".join(dots_8.inspect_asm().values())
    widened = [line for line in code.splitlines() if "vpmovzxwd" in line and ("ymm" in line or "zmm" in line)]
    products = [line for line in code.splitlines() if "vfmadd" in line and ("ymm" in line or "zmm" in line)]
    assert len(widened) >= 8 and len(products) >= 8


def test_kernels_of_a_folder_that_cannot_be_written_to_are_cached_for_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    folder = tmp_path / "installed"
    folder.mkdir()
    # a file of that name stops Numba as a read-only folder does, whoever runs this
    (folder / "__pycache__").write_text("")
    shutil.copy(rms_norm.__file__, folder)
    spec = importlib.util.spec_from_file_location("installed_rms_norm", folder / "rms_norm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = rand("cpu", torch.float32)(2, 8)
    assert relative_l2(module.rms_norm(x, None, 1e-6), OPS["rms_norm"].reference(x, None, 1e-6)) < 1e-6
    assert list((tmp_path / "user").rglob("rms_norm._some*.nbi"))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_many_tokens_go_another_way_to_the_same_result(dtype):
    op, r = OPS["moe_experts"], rand("cpu", dtype)
    tokens = 2 * moe_experts.FEW_TOKENS[dtype] + 3
    weights = r(tokens, 2).float()
    args = (r(tokens, 32), torch.randint(-1, 3, (tokens, 2)), weights, r(3, 48, 32) / 5, r(3, 32, 24) / 5)
    wide = [x.double() if x.is_floating_point() else x for x in args]
    assert relative_l2(moe_experts.moe_experts(*args), op.reference(*wide)) < op.tolerance[dtype]
    op, heads = OPS["mla_attention"], mla_attention.FEW_ROWS // 2
    seen = torch.arange(70) < 50
    tensors = (
        r(2, heads, 3, 8),
        r(2, heads, 3, 4),
        r(2, 70, 16),
        r(2, 70, 4),
        r(heads, 8, 16),
        r(heads, 6, 16),
    )
    wide = [x.double() for x in tensors]
    for mask in (seen.expand(1, 1, 3, 70), torch.zeros(1, 1, 1, 1), None):
        got, want = mla_attention.mla_attention(*tensors, mask, 0.2), op.reference(*wide, mask, 0.2)
        assert relative_l2(got, want) < op.tolerance[dtype]


def test_linears_of_few_and_many_tokens():
    op, r = OPS["multi_linear"], rand("cpu", BFLOAT16)
    x, w = r(multi_linear.FEW_TOKENS + 1, 32), r(24, 32)
    want = x.double() @ w.double().T
    for part in (x, x[:-1]):
        assert relative_l2(multi_linear.linear(part, w), want[: len(part)]) < op.tolerance[BFLOAT16]


def test_routing_takes_nan_for_the_largest_and_ties_in_order():
    logits = torch.tensor([[1.0, float("nan"), 3.0, 3.0, float("nan"), -0.0, 0.0, -5.0]])
    bias = torch.zeros(8)
    for groups in ((1, 1), (4, 2)):
        args = OPS["moe_route"].bind((logits, 6, "sigmoid", bias, *groups, "top2"))
        kernel = next(k for k in kernels("moe_route")[0] if k.backend == "numba")
        weights, ids = kernel.plan(*args)(*args)
        want_weights, want_ids = OPS["moe_route"].reference(*args)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(weights, want_weights, equal_nan=True)


def verdict(name, *args):
    return dict(explain(OPS[name], *args))[f"numba.{name}"]


def test_refusals_have_reasons():
    r = rand("cpu", BFLOAT16)
    x, w = r(2, 8), r(6, 16)[:, ::2]
    assert "neighbours, got strides [16, 2]" in verdict("multi_linear", x, [w], [None])
    assert "w_gate of x's dtype" in verdict("gated_mlp", x, r(6, 8).float(), r(6, 8), r(8, 6))
    assert "needs dtype bfloat16, float32, got float16" in verdict("rms_norm", x.half(), None, 1e-6)
    w13, ids = r(3, 8, 8).mT.contiguous().mT, torch.zeros(2, 1, dtype=torch.int64)
    assert "rows of w13" in verdict("moe_experts", x, ids, torch.ones(2, 1), w13, r(3, 8, 4))
    assert "even width" in verdict("rope", r(2, 3), r(2, 3), r(2, 3), False, False)
    assert "one mask for all heads" in verdict(
        "mla_attention", r(1, 2, 1, 4), r(1, 2, 1, 2), r(1, 3, 4), r(1, 3, 2), r(2, 4, 4), r(2, 4, 4),
        torch.ones(1, 2, 1, 3, dtype=torch.bool), 1.0,
    )  # fmt: skip
