"""dsopt.compile on models that loop over their experts: one graph, the same results, the weights shared."""

import copy
import weakref

import pytest
import torch
from loops import (
    EXPERTS,
    HIDDEN,
    Called,
    Clamped,
    Gated,
    Inline,
    Masked,
    Merged,
    Plain,
    Pool,
    Router,
    Sorted,
    Stacked,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsopt
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """Residual blocks with a norm before each."""

    def __init__(self, *blocks):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            y = block(self.norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


def model_of(*blocks, dtype=torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model(*(make() for make in blocks)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.to(dtype)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compiled(model, **options):
    return dsopt.compile(model, **{"fallback": "eager", "strict": True, **options})


def refusals(model) -> list[str]:
    return [p.refused for p in dsopt.report(model).prepared]


LAYOUTS = {
    "masked": Masked,
    "biased": lambda: Masked(lambda: Gated(bias=True, names=("w1", "w3", "w2"), act=nn.GELU())),
    "identity": lambda: Masked(num_identity=3),
    "inline": Inline,
    "merged": lambda: Inline(Merged),
    "plain": lambda: Masked(Plain),
    "clamped": lambda: Masked(Clamped),
    "sorted": Sorted,
    "sorted-alone": lambda: Sorted(extra=(), shared=False),
    "pool": lambda: Called(Pool()),
    "stacked": lambda: Called(Stacked()),
    "stacked-clamped": lambda: Called(Stacked(limit=0.4)),
    "stacked-oai": lambda: Called(
        Stacked(transposed=True, bias=True, interleaved=True, limit=1.5, alpha=1.702)
    ),
    "stacked-identity": lambda: Called(Stacked(num_identity=3), EXPERTS + 3),
}


@pytest.mark.parametrize(
    ("layout", "dtype", "shapes"),
    [
        *((layout, torch.float32, [(1, 5)]) for layout in LAYOUTS),
        ("inline", torch.float32, [(1, 1), (16, 1), (2, 3), (2, 0)]),
        ("sorted", torch.bfloat16, [(1, 5), (16, 1), (1, 0)]),
        ("masked", torch.bfloat16, [(1, 1)]),
        ("stacked-oai", torch.bfloat16, [(3, 1)]),
    ],
)
def test_every_layout_is_one_graph(layout, dtype, shapes):
    model = model_of(LAYOUTS[layout], dtype=dtype)
    reference = copy.deepcopy(model).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = compiled(model)
    assert refusals(fast) == [None]
    with torch.inference_mode():
        for shape in shapes:
            x = tokens(*shape, dtype=dtype)
            got = fast(x)
            assert len(dsopt.report(fast).graphs) <= shapes.index(shape) + 1
            assert got.dtype == dtype and got.shape == x.shape
            if x.numel():
                eager, want = model(x), reference(x.double())
                allowed = 1e-5 if dtype == torch.float32 else 1.5 * relative_l2(eager, want) + 1e-3
                assert relative_l2(got, want) <= allowed
    assert all("moe_experts" in {k.op for k in g.kernels} for g in dsopt.report(fast).graphs)
    assert list(model.state_dict()) == list(fast.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_are_shared_and_changes_in_place_show():
    model = model_of(Sorted)
    fast, x = compiled(model), tokens(2, 3)
    parameters = dict(model.named_parameters())
    assert all(p is parameters[name] for name, p in fast.named_parameters())
    with torch.no_grad():
        before = fast(x)
        model.blocks[0].experts[2].down_proj.weight.mul_(-2)
        model.blocks[0].experts[5].gate_proj.weight.data.add_(0.5)
        model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})
        want = model(x)
        assert relative_l2(fast(x), want) < 1e-5 < relative_l2(before, want)
    assert len(dsopt.report(fast).graphs) == 1


def _convert(model):
    model.to(torch.float64)


def _assign(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _data(model):
    model.blocks[0].experts[4].up_proj.weight.data = torch.randn(12, HIDDEN)


def _module(model):
    model.blocks[0].experts[3] = Gated()


def _linear(model):
    model.blocks[0].experts[3].up_proj = nn.Linear(HIDDEN, 12, bias=False)


@pytest.mark.parametrize("change", [_convert, _assign, _data, _module, _linear])
def test_weights_that_moved_are_an_error_and_compile_again(change):
    model = model_of(Sorted)
    fast = compiled(model)
    with torch.no_grad():
        fast.blocks[0](tokens(1, 2))
        change(model)
        x = tokens(1, 2).to(next(model.parameters()).dtype)
        with pytest.raises(
            RuntimeError, match=r"in blocks\.0 were moved.* call dsopt\.compile on the model again"
        ):
            fast(x)
        torch.compiler.reset()
        if change is _convert:
            assert relative_l2(compiled(model)(x), model(x)) < 1e-6


def test_compiling_twice_stacks_once():
    model = model_of(Sorted)
    compiled(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    again = compiled(model)
    assert refusals(again) == [None] and addresses == [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        assert relative_l2(again(tokens(1, 3)), model(tokens(1, 3))) < 1e-5


def test_copies_gradients_and_training_run_the_loop():
    model = model_of(Inline)
    fast, x = compiled(model), tokens(1, 4)
    with torch.no_grad():
        other, want = copy.deepcopy(fast), model(x)
        assert torch.equal(other(x), want)
        for expert in other.blocks[0].experts:
            expert.up_proj.weight.zero_()
        assert torch.equal(other(x), x) and torch.equal(model(x), want)
        fast.train()
        assert torch.equal(fast.blocks[0](x)[0], model.blocks[0](x)[0])
        fast.eval()
    fast.blocks[0](x)[0].sum().backward()
    assert any(p.grad is not None for p in model.blocks[0].experts.parameters())


class Live(TorchDispatchMode):
    """The most bytes of tensors alive at once, of a model's own and of those made meanwhile."""

    def __init__(self, model):
        super().__init__()
        self.model, self.made, self.peak = model, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        alive = [*(t for ref in self.made if (t := ref()) is not None), *self.model.parameters()]
        storages = [t.untyped_storage() for t in alive]
        self.peak = max(self.peak, sum({s._cdata: s.nbytes() for s in storages}.values()))
        return out


def test_memory_grows_by_one_layer_at_most():
    model = model_of(*[lambda: Masked(lambda: Gated(256))] * 3)
    own = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.blocks[0].pool.parameters())
    with Live(model) as live:
        fast = compiled(model)
    assert refusals(fast) == [None] * 3
    # beside the stack there are the tokens it is tried on
    assert own + layer < live.peak < own + 1.5 * layer
    held = {s._cdata: s.nbytes() for m in fast.modules() for s in _storages(m)}
    assert sum(held.values()) == own


def _storages(module):
    tensors = (
        t for t in (*vars(module).values(), *module._parameters.values()) if isinstance(t, torch.Tensor)
    )
    return [t.untyped_storage() for t in tensors]


class Crowded(Inline):
    """An expert takes four tokens at most."""

    def forward(self, hidden):
        batch, length, width = hidden.shape
        tokens = hidden.reshape(-1, width)
        weights, ids = torch.topk(self.route(tokens).softmax(-1), 2, dim=-1)
        total = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            row, slot = row[:4], slot[:4]
            total.index_add_(0, row, expert(tokens[row]) * weights[row, slot, None])
        return total.view(batch, length, width)


class Counting(Inline):
    """A forward with a memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden):
        self.seen += hidden.shape[1]
        return super().forward(hidden)


class Remembering(Inline):
    def forward(self, hidden):
        self.last = super().forward(hidden)
        return self.last


class ByLength(Inline):
    """Short inputs are computed otherwise."""

    def forward(self, hidden):
        out, logits = super().forward(hidden)
        return (out * 2 if hidden.shape[1] < 3 else out), logits


class Dense(Inline):
    """Every expert sees every token: no ids anywhere."""

    def forward(self, hidden):
        share = self.route(hidden).softmax(-1)
        return sum(share[..., e : e + 1] * expert(hidden) for e, expert in enumerate(self.experts))


class Weighted(Stacked):
    """The weight goes into the activation, not onto the result."""

    def forward(self, hidden, index, scores):
        return super().forward(hidden * scores.sum(-1, keepdim=True), index, torch.ones_like(scores))


class Bounded(Inline):
    """What large numbers come to is kept within limits."""

    def forward(self, hidden):
        y, logits = super().forward(hidden)
        return y.clamp(-50.0, 50.0), logits


class BoundedTokens(nn.Module):
    """The experts see tokens kept within limits, which small ones do not show."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Gated() for _ in range(EXPERTS)])
        self.gate = Router()

    def forward(self, x):
        ids, weights = self.gate(x)
        tokens = x.reshape(-1, HIDDEN)
        total = torch.zeros_like(tokens)
        for e in range(EXPERTS):
            rows, slots = torch.where(ids == e)
            if rows.numel():
                y = self.experts[e](tokens[rows].clamp(-6.0, 6.0)) * weights[rows, slots].unsqueeze(-1)
                total.index_add_(0, rows, y.to(tokens.dtype))
        return total.view(x.shape)


class Rescaled(Sorted):
    """Decides by what the experts gave."""

    def infer(self, x, ids, weights):
        y = super().infer(x, ids, weights)
        if y.abs().max() > 100.0:
            y = y / y.abs().max()
        return y


def _hooked():
    block = Inline()
    block.experts[1].down_proj.register_forward_hook(lambda *_: None)
    return block


def _tied():
    block = Inline()
    block.experts[1].down_proj.weight = block.experts[0].down_proj.weight
    return block


def _sliced():
    block = Inline()
    whole = torch.randn(2, 12, HIDDEN)
    for e in range(2):
        block.experts[e].up_proj.weight.data = whole[e]
    return block


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _subclass():
    block = Inline()
    for expert in block.experts:
        expert.up_proj = Scaled(HIDDEN, 12)
    return block


def test_a_frozen_expert_costs_the_others_no_gradient():
    model = model_of(Inline)
    for p in model.blocks[0].experts[0].parameters():
        p.requires_grad_(False)
    expected = copy.deepcopy(model)
    x = tokens(2, 20)
    expected(x).sum().backward()
    compiled(model, strict=False)(x).sum().backward()
    for p, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (want.grad is None)
        assert want.grad is None or relative_l2(p.grad, want.grad) < 1e-5


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Crowded, "its result differs"),
        (Bounded, "its result differs"),
        (BoundedTokens, "its result differs"),
        (Rescaled, "decides by something else than the ids"),
        (Counting, "keeps 'seen' from one call to the next"),
        (Remembering, "keeps 'last' from one call to the next"),
        (ByLength, "decides by something else than the ids"),
        (Dense, "no ids and weights of the chosen experts"),
        (lambda: Inline(lambda: Gated(act=torch.tanh)), "activation is none of silu"),
        (lambda: Called(Weighted()), "no reading of its weights gives what it computes"),
        (_hooked, "has hooks"),
        (_tied, "shares its memory with another"),
        (_sliced, "shares its memory with another"),
        (_subclass, "is a Scaled, not a plain nn.Linear"),
    ],
)
def test_refusals_leave_the_model_as_it_was(make, reason):
    model = model_of(make)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.state_dict(keep_vars=True).items()}
    fast = compiled(model)
    (refused,) = refusals(fast)
    assert reason in refused
    for name, value in model.state_dict(keep_vars=True).items():
        assert (
            value is before[name][0]
            and value.data_ptr() == before[name][1]
            and torch.equal(value, before[name][2])
        )


def test_prepare_can_be_switched_off_and_training_is_left_alone():
    model = model_of(Inline)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert dsopt.report(compiled(model, prepare=False)).prepared == []
    assert refusals(compiled(model.train())) == ["it is in training mode; call eval() first"]
    assert pointers == [p.data_ptr() for p in model.parameters()]
    with pytest.raises(TypeError, match="prepare must be True or False, got 1"):
        dsopt.compile(model, prepare=1)


def test_the_report_names_what_was_prepared():
    model = model_of(Inline, Dense)
    fast = compiled(model)
    found = dsopt.report(fast).to_dict()["prepared"]
    assert found[0] == {"site": "blocks.0", "what": "loop over 6 experts", "refused": None}
    assert found[1]["site"] == "blocks.1" and "no ids" in found[1]["refused"]
    assert "blocks.0" in str(dsopt.report(fast)) and "batched" in str(dsopt.report(fast))
    assert dsopt.report(model).to_dict()["prepared"] == []
