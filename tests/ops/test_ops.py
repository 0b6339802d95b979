"""Each op on its own: as PyTorch sees it, under fake tensors, in a user's own compiled or exported code."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from dsopt.op import Op
from dsopt.ops import OPS
from dsopt.ops.linear import gated_mlp, multi_linear
from dsopt.ops.norm import rms_norm
from dsopt.testing import rand, relative_l2

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def samples(op: Op, dtype=torch.float32, most=20_000) -> list[tuple]:
    """The op's samples that are small and not empty."""

    def fits(args):
        return all(0 < x.numel() < most for x in tree_leaves(args) if isinstance(x, torch.Tensor))

    return [args for args in op.samples(CPU, dtype) if fits(args)]


def smallest(op: Op, dtype=torch.float32) -> tuple:
    sizes = [
        sum(x.numel() for x in tree_leaves(a) if isinstance(x, torch.Tensor)) for a in samples(op, dtype)
    ]
    return samples(op, dtype)[sizes.index(min(sizes))]


BUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def widened(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@each_op
def test_opcheck(op):
    for args in (samples(op, most=5000)[0], smallest(op)):
        fp8 = any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in tree_leaves(args))
        if fp8:  # PyTorch's check of the schema compares tensors with arithmetic that float8 lacks
            torch.library.opcheck(op.overload, args, test_utils=BUT_SCHEMA)
        torch.library.opcheck(op.overload, tree_map(widened, args) if fp8 else args)


@each_op
def test_fake_results_match_real_ones(op):
    for args in op.samples(CPU, torch.bfloat16):
        real = tree_leaves(op.overload(*args))
        with FakeTensorMode() as mode:
            fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, args)
            fake = tree_leaves(op.overload(*fakes))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert a.is_contiguous() and b.is_contiguous()


@each_op
def test_in_a_compiled_function(op):
    args = samples(op)[0]
    for backend in ("eager", "aot_eager"):
        fn = torch.compile(lambda *args: op.overload(*args), fullgraph=True, backend=backend)
        for a, b in zip(tree_leaves(fn(*args)), tree_leaves(op.overload(*args)), strict=True):
            assert relative_l2(a, b) <= op.tolerance[torch.float32]


@each_op
def test_in_a_graph_that_dsopt_compiles(op):
    from dsopt.backend import dsopt_backend

    args = samples(op)[0]

    def fn(*args):
        return [x * 2 for x in tree_leaves(op.overload(*args))]

    with torch.no_grad():
        got = torch.compile(fn, fullgraph=True, backend=dsopt_backend, options={"strict": True})(*args)
    for a, b in zip(got, fn(*args), strict=True):
        assert relative_l2(a, b) <= op.tolerance[torch.float32]


@each_op
def test_exported(op):
    sample = samples(op)[0]
    # a dtype is no input of a program
    args = tuple(x for x in sample if not isinstance(x, torch.dtype))

    class Calls(torch.nn.Module):
        def forward(self, *args):
            given = iter(args)
            return op.overload(*(x if isinstance(x, torch.dtype) else next(given) for x in sample))

    program = torch.export.export(Calls(), args)
    assert op.overload in [n.target for n in program.graph.nodes]
    for a, b in zip(tree_leaves(program.module()(*args)), tree_leaves(op.overload(*sample)), strict=True):
        assert relative_l2(a, b) <= op.tolerance[torch.float32]
    plain = program.run_decompositions({op.overload: op.reference})
    assert not any("dsopt" in str(n.target) for n in plain.graph.nodes)


def requiring_grad(args: tuple) -> tuple:
    def wide(x):
        if isinstance(x, (list, tuple)):
            # PyTorch has no gradients for a list in which None stands beside tensors
            return [wide(y) for y in x] if None not in x else x
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
            return x
        return x.detach().double().requires_grad_()

    return tuple(wide(x) for x in args)


@each_op
def test_gradients(op):
    args = requiring_grad(smallest(op, torch.float64))
    flat, spec = torch.utils._pytree.tree_flatten(args)
    where = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]

    def fn(*leaves):
        full = list(flat)
        for i, x in zip(where, leaves, strict=True):
            full[i] = x
        return tuple(tree_leaves(op.overload(*torch.utils._pytree.tree_unflatten(full, spec))))

    assert torch.autograd.gradcheck(fn, [flat[i] for i in where], fast_mode=True)


@each_op
def test_gradients_equal_the_references(op):
    args = requiring_grad(samples(op, torch.float64)[-1])
    leaves = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = [
        torch.autograd.grad([y.square().sum() for y in tree_leaves(f(*args)) if y.requires_grad], leaves)
        for f in (op.overload, op.reference)
    ]
    assert all(relative_l2(a, b) < 1e-9 for a, b in zip(*grads, strict=True))


def test_gradients_of_some_arguments_only():
    r = rand(CPU, torch.float64)
    x, w = r(3, 8), r(8).requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm.overload(x, w, 1e-6).sum(), [w])
    (want,) = torch.autograd.grad(rms_norm.reference(x, w, 1e-6).sum(), [w])
    assert relative_l2(grad, want) < 1e-12


def test_gradients_for_biases():
    r = rand(CPU, torch.float64)
    x, weights = r(3, 8), [r(4, 8), r(5, 8)]
    biases = [r(4).requires_grad_(), r(5).requires_grad_()]
    sum(y.sum() for y in multi_linear.overload(x, weights, biases)).backward()
    assert all(torch.equal(b.grad, torch.full_like(b, 3)) for b in biases)
    with pytest.raises(NotImplementedError, match="found None"):
        multi_linear.overload(x.requires_grad_(), weights, [None, biases[1]])


def test_gradients_of_one_result_of_many():
    r = rand(CPU, torch.float64)
    x, weights = r(3, 8).requires_grad_(), [r(4, 8).requires_grad_(), r(5, 8).requires_grad_()]
    first, _ = multi_linear.overload(x, weights, [None, None])
    first.sum().backward()
    assert relative_l2(x.grad, weights[0].detach().sum(0).expand(3, 8)) < 1e-12
    assert weights[1].grad is None or not weights[1].grad.any()


def test_mixed_biases():
    r = rand(CPU, torch.float32)
    x, weights = r(2, 3, 8), [r(4, 8), r(1, 8), r(5, 8)]
    for given in itertools.product((False, True), repeat=3):
        biases = [r(w.shape[0]) if b else None for w, b in zip(weights, given, strict=True)]
        got = torch.ops.dsopt.multi_linear(x, weights, biases)
        want = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        assert all(relative_l2(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_one_bias_per_weight():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.dsopt.multi_linear(torch.ones(1, 2), [torch.ones(3, 2)] * 2, [None])


def test_bind_fills_in_defaults():
    x, w = torch.ones(1, 2), torch.ones(2, 2)
    assert gated_mlp.bind((x, w, w, w)) == (
        x,
        w,
        w,
        w,
        None,
        None,
        None,
        "silu",
        None,
        None,
        None,
        None,
        [128, 128],
    )
    bound = gated_mlp.bind((x, w, w), {"w_down": w, "b_up": w[0]})
    assert len(bound) == 13 and bound[3] is w and bound[4] is None and bound[5].shape == (2,)


def test_bind_refuses_what_the_schema_does_not_have():
    x = torch.ones(1, 2)
    with pytest.raises(TypeError, match="rms_norm has no argument 'epsilon'"):
        rms_norm.bind((x, None, 1e-6), {"epsilon": 1e-6})
    with pytest.raises(TypeError, match="rms_norm takes 3 arguments, got 4"):
        rms_norm.bind((x, None, 1e-6, 7))
    with pytest.raises(TypeError, match="rms_norm needs 'eps'"):
        rms_norm.bind((x, None))


def test_an_op_name_stands_for_one_op():
    with pytest.raises(RuntimeError, match="rms_norm"):
        Op("rms_norm", rms_norm.schema, rms_norm.reference, rms_norm.samples)
