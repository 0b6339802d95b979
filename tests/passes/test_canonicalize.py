import pytest
import torch
from torch.nn import functional as F

from dsopt.testing import relative_l2, rewritten


def check(fn, *args, ops, dynamic=None):
    """Canonicalizes fn, compares its calls with `ops` and its results with eager's, bit for bit."""
    result = rewritten(fn, *args, passes=("canonicalize",), dynamic=dynamic)
    assert result.ops() == ops
    got, want = result.run(*args), fn(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_l2(a, b) < 1e-6
    return result


X, Y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
W, BIAS = torch.randn(5, 8), torch.randn(5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.to(torch.float32) + 1,
        lambda x: x.float() + 1,
        lambda x: x.type_as(x) + 1,
        lambda x: x.to("cpu") + 1,
        lambda x: x.to(device="cpu", dtype=torch.float32) + 1,
        lambda x: x.detach() + 1,
        lambda x: F.dropout(x, 0.0) + 1,
        lambda x: F.dropout(x, 0.5, training=False) + 1,
        lambda x: x[:, :, :] + 1,
        lambda x: x[..., 0:8] + 1,
        lambda x: x.view(2, 3, 8) + 1,
        lambda x: x.reshape(2, -1, 8) + 1,
        lambda x: x.expand(2, 3, 8) + 1,
        lambda x: x.expand(-1, -1, -1) + 1,
        lambda x: x.contiguous() + 1,
        lambda x: x.permute(0, 1, 2) + 1,
        lambda x: x.transpose(0, 1).transpose(1, 0) + 1,
        lambda x: x.mT.permute(0, 2, 1) + 1,
        lambda x: x.flatten(2) + 1,
        lambda x: x * 1 + 1,
        lambda x: 1.0 * x + 1,
        lambda x: x / 1 + 1,
        lambda x: x + 0 + 1,
        lambda x: x.clamp(max=float("inf")) + 1,
        lambda x: x.clamp(-float("inf"), float("inf")) + 1,
    ],
)
def test_what_does_nothing_is_gone(fn):
    check(fn, X, ops=["aten.add"])


def test_casts_have_one_spelling():
    for fn in (
        lambda x: x.to(torch.bfloat16),
        lambda x: x.bfloat16(),
        lambda x: x.to("cpu", torch.bfloat16),
        lambda x: x.type_as(torch.empty(0, dtype=torch.bfloat16)),
    ):
        result = rewritten(fn, X, passes=("canonicalize",))
        casts = [n for n in result.graphs[-1].graph.nodes if n.target == torch.ops.aten.to.dtype]
        assert len(casts) == 1 and result.count("aten._to_copy") == 0
        assert result.run(X).dtype == torch.bfloat16


def test_active_dropout_stays():
    result = rewritten(lambda x: F.dropout(x, 0.5, training=True), X, passes=("canonicalize",))
    assert result.ops() == ["aten.dropout"]


def test_contiguous_of_a_transposed_tensor_stays():
    result = check(lambda x: x.mT.contiguous(), X, ops=["aten.permute", "aten.contiguous"])
    assert result.run(X).is_contiguous()


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.split([2, 6], -1)[1],
        lambda x: torch.split(x, 2, -1)[1] + torch.split(x, 2, -1)[3],
        lambda x: x.chunk(4, dim=2)[2],
        lambda x: x.tensor_split(4, dim=-1)[-1],
        lambda x: x.narrow(-1, 2, 4),
    ],
)
def test_pieces_are_slices(fn):
    result = rewritten(fn, X, passes=("canonicalize",))
    assert set(result.ops()) <= {"aten.slice", "aten.add"}
    assert torch.equal(result.run(X), fn(X))


def test_unbind_is_select():
    check(lambda x: x.unbind(1)[1] + x.unbind(1)[-1], X, ops=["aten.select", "aten.select", "aten.add"])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.transpose(-1, 1).contiguous(),
        lambda x: x.mT.contiguous(),
        lambda x: x.swapaxes(1, 2).contiguous(),
        lambda x: x.permute(0, -1, 1).contiguous(),
        lambda x: x.permute(2, 1, 0).permute(2, 0, 1).contiguous(),
        lambda x: x.permute(1, 0, 2).transpose(0, 1).transpose(1, 2).contiguous(),
    ],
)
def test_transpositions_are_permute(fn):
    check(fn, X, ops=["aten.permute", "aten.contiguous"])


@pytest.mark.parametrize("fn", [lambda x: x.t() + 1, lambda x: x.T + 1, lambda x: x.transpose(0, 1) + 1])
def test_matrix_transpositions_are_permute(fn):
    check(fn, W, ops=["aten.permute", "aten.add"])


@pytest.mark.parametrize(
    "fn", [lambda x: x * x, lambda x: x.square(), lambda x: torch.square(x), lambda x: x**2]
)
def test_squares(fn):
    check(fn, X, ops=["aten.pow"])


def test_square_of_bfloat16_keeps_its_dtype():
    check(lambda x: x * x, X.bfloat16(), ops=["aten.pow"])


@pytest.mark.parametrize("fn", [lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x, F.silu])
def test_silu(fn):
    check(fn, X, ops=["aten.silu"])


@pytest.mark.parametrize("fn", [lambda x: x * torch.sigmoid(x + 1), lambda x: x * torch.sigmoid(1.702 * x)])
def test_other_sigmoid_gates_are_no_silu(fn):
    result = rewritten(fn, X, passes=("canonicalize",))
    assert result.count("aten.silu") == 0
    assert relative_l2(result.run(X), fn(X)) < 1e-6


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 1 / torch.sqrt(x),
        lambda x: torch.reciprocal(torch.sqrt(x)),
        lambda x: x**-0.5,
        lambda x: torch.pow(x, -0.5),
        lambda x: x.sqrt().reciprocal(),
    ],
)
def test_reciprocal_roots(fn):
    result = check(fn, X.abs() + 1, ops=["aten.rsqrt"])
    assert result.log("canonicalize").rewrites


def test_division_by_a_root_is_a_product():
    check(lambda x, y: x / torch.sqrt(y), X, Y.abs() + 1, ops=["aten.rsqrt", "aten.mul"])
    check(lambda y: 3 / torch.sqrt(y), Y.abs() + 1, ops=["aten.rsqrt", "aten.mul"])


def test_floor_division_by_a_root_stays():
    def fn(x, y):
        return torch.div(x, torch.sqrt(y), rounding_mode="floor")

    check(fn, X, Y.abs() + 1, ops=["aten.sqrt", "aten.div"])


def test_integers_keep_their_meaning():
    n = torch.arange(6).reshape(2, 3)
    check(lambda n: n / 1, n, ops=["aten.div"])
    check(lambda n: -(n * 1), n, ops=["aten.neg"])
    check(lambda n: n * 1.0, n, ops=["aten.mul"])
    check(lambda n: -(n + 0), n, ops=["aten.neg"])
    check(lambda n: n + 0.0, n, ops=["aten.add"])
    check(lambda n: n * n, n, ops=["aten.pow"])


def test_zero_added_to_a_smaller_tensor_stays():
    result = rewritten(lambda x, y: torch.add(x, y, alpha=0), X, Y, passes=("canonicalize",))
    assert torch.equal(result.run(X, Y), X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.t(),
        lambda x, w: torch.matmul(x, w.transpose(0, 1)),
        lambda x, w: torch.einsum("bsk,nk->bsn", x, w),
        lambda x, w: torch.einsum("...k,nk->...n", x, w),
        lambda x, w: torch.einsum("b s k, n k -> b s n", x, w),
    ],
)
def test_products_with_a_weight_are_linear(fn):
    check(fn, X, W, ops=["aten.linear"])


def test_einsum_over_a_transposed_weight():
    check(
        lambda x, w: torch.einsum("bsk,kn->bsn", x, w),
        X,
        W.T.contiguous(),
        ops=["aten.permute", "aten.linear"],
    )


def test_matrix_products_are_linear():
    x = X[0]
    check(lambda x, w: torch.mm(x, w.t()), x, W, ops=["aten.linear"])
    check(lambda x, w, b: torch.addmm(b, x, w.t()), x, W, BIAS, ops=["aten.linear"])


def test_scaled_addmm_stays():
    check(
        lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2),
        X[0], W, BIAS,
        ops=["aten.permute", "aten.addmm"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "equation", ["bsk,nk->bns", "bsk,bk->bs", "bsk,sk->bsk", "bsk,nk->sbn", "bsk,kk->bsk", "bsk,nk->bn"]
)
def test_other_einsums_stay(equation):
    sizes = {"b": 2, "s": 3, "k": 8, "n": 5}
    w = torch.randn([sizes[a] for a in equation.partition(",")[2].partition("->")[0]])
    result = rewritten(lambda x, w: torch.einsum(equation, x, w), X, w, passes=("canonicalize",))
    assert result.ops() == ["aten.einsum"]


def test_activations_multiplied_are_no_linear():
    result = rewritten(lambda x, y: x @ y.mT, X, Y, passes=("canonicalize",))
    assert result.ops() == ["aten.permute", "aten.matmul"]


def test_copies_into_a_fresh_buffer_are_cat():
    def joined(x, y):
        out = x.new_empty(2, 3, 12)
        out[..., :8] = x
        out[..., 8:] = y[..., :4]
        return out * 2

    check(joined, X, Y, ops=["aten.slice", "aten.cat", "aten.mul"])


def test_copies_of_nothing_are_no_part():
    def joined(x, y, nothing):
        out = x.new_empty(2, 3, 12)
        out[..., :8] = x
        out[..., 8:8] = nothing
        out[..., 8:] = y[..., :4]
        return out * 2

    check(joined, X, Y, X[..., :0], ops=["aten.slice", "aten.cat", "aten.mul"])


def test_one_copy_that_fills_a_fresh_buffer_is_a_clone():
    def filled(x, nothing):
        out = x.new_empty(2, 3, 8)
        out[..., :8].copy_(x)
        out[..., 8:].copy_(nothing)
        return out * 2, out

    check(filled, X, X[..., :0], ops=["aten.clone", "aten.mul"])


def test_a_copy_before_its_source_is_written_stays():
    def fn(x):
        x = x + 1
        out = x.new_empty(2, 3, 8)
        out.copy_(x)
        x.index_fill_(0, torch.tensor([0]), 2.0)
        return out, x

    result = rewritten(fn, X, passes=("canonicalize",))
    for got, want in zip(result.run(X), fn(X), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["gap", "overlap", "read early", "broadcast", "written twice"])
def test_copies_that_are_no_cat_stay(case):
    def fn(x, y):
        out = x.new_empty(2, 3, 16) if case == "overlap" else x.new_zeros(2, 3, 16)
        out[..., :8] = x
        if case == "read early":
            x = x + out[..., :8]
        if case == "written twice":
            out.copy_(torch.cat((x, y), -1))
            out.copy_(torch.cat((y, x), -1))
        elif case == "overlap":
            out[..., 7:15] = y
            out[..., 15:] = 1
        elif case == "gap":
            out[..., 8:12] = y[..., :4]
        else:
            out[..., 8:] = y[:, :1] if case == "broadcast" else y
        return out, x

    check_values = rewritten(fn, X, Y, passes=("canonicalize",))
    for a, b in zip(check_values.run(X, Y), fn(X, Y), strict=True):
        assert torch.equal(a, b)


def test_dead_code_is_gone():
    def fn(x):
        x.exp()
        torch.zeros(3)
        return x + 1

    check(fn, X, ops=["aten.add"])


def test_dynamic_shapes():
    def fn(x):
        a, b = x.chunk(2, -1)
        return (a.transpose(0, 1).transpose(0, 1) * torch.sigmoid(a)).to(x.dtype), b.reshape(b.shape)

    torch._dynamo.mark_dynamic(x := torch.randn(2, 3, 8), 1)
    result = rewritten(fn, x, passes=("canonicalize",))
    for tokens in (5, 9):
        x = torch.randn(2, tokens, 8)
        assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), fn(x), strict=True))
    assert len(result.graphs) == 1


def test_products_of_integers_keep_their_dtype():
    flags, counts = torch.arange(5) % 2 == 0, torch.arange(5)
    check(lambda m: m * m, flags, ops=["aten.mul"])
    check(lambda n: n * torch.sigmoid(n), counts, ops=["aten.sigmoid", "aten.mul"])


def test_a_memory_format_is_kept():
    def fn(x):
        return x.to(torch.bfloat16, memory_format=torch.channels_last)

    x = torch.randn(2, 3, 4, 5)
    result = rewritten(fn, x, passes=("canonicalize",))
    assert result.run(x).stride() == fn(x).stride()
    same = rewritten(
        lambda x: x.to(torch.float32, memory_format=torch.channels_last) + 1, x, passes=("canonicalize",)
    )
    assert same.run(x).stride() == x.contiguous(memory_format=torch.channels_last).stride()


def test_einsum_that_broadcasts_the_contracted_dim_stays():
    check(
        lambda x, w: torch.einsum("bk,nk->bn", x, w),
        torch.randn(4, 1),
        torch.randn(3, 5),
        ops=["aten.einsum"],
    )
