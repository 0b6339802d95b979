"""dsopt.quantize_ and dsopt.compile(fp8=True): which weights become FP8, in how much memory, and what is refused."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsopt
from dsopt.fp8 import FP8Block, FP8Group, dequantize, quantize
from dsopt.fp8.convert import SKIP
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.models import presets
from dsopt.testing import rand, relative_l2

SMALL = FP8Block(rows=16, columns=8)
IDS = torch.arange(20).view(2, 10)


def decoder(preset="v3", dtype=torch.float32, **changes):
    return presets.random_model(presets.config({**presets.tiny(presets.PRESETS[preset]()), **changes}), dtype)


def rounded(w: torch.Tensor, format=SMALL) -> torch.Tensor:
    return dequantize(*quantize(w, format), w.dtype, format.block_of(w.shape))


def rounded_model(model: nn.Module, modules: list[str], format=SMALL) -> nn.Module:
    """The same model, wide, with the weights that FP8 keeps."""
    model = copy.deepcopy(model)
    for path in modules:
        for name, p in model.get_submodule(path).named_parameters():
            halves = p.data.chunk(2, 1) if name == "gate_up_proj" else [p.data]
            if p.ndim > 1:
                p.data = torch.cat([rounded(h, format) for h in halves], 1)
    return model


def weights(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict) -> bool:
    after = weights(model)
    return before.keys() == after.keys() and all(
        before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) for n in before
    )


@pytest.mark.parametrize("preset", ["v2-lite", "v3"])
@torch.no_grad()
def test_a_decoder_computes_with_the_rounded_weights(preset):
    model = decoder(preset, moe_intermediate_size=24)  # gate and up in partial blocks of their own
    original = copy.deepcopy(model)
    done = dsopt.quantize_(model, SMALL)
    kinds = {path: type(module) for path, module in model.named_modules() if path in done.modules}
    assert kinds["model.layers.1.mlp.experts"] is FP8Experts
    assert kinds["model.layers.0.self_attn.kv_b_proj"] is FP8Linear
    assert set(kinds.values()) == {FP8Experts, FP8Linear} and len(kinds) == len(done.modules)
    assert done.left == {"lm_head": "skipped"} and "MiB" in str(done)
    assert done.bytes_after < 0.35 * done.bytes_before  # of float32, with scales of blocks of 128
    wide = {
        n for n, p in model.named_parameters() if p.dtype == torch.float32 and not n.endswith("_scale_inv")
    }
    assert all(
        n.endswith(("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight")) for n in wide
    )
    assert relative_l2(model(IDS).logits, rounded_model(original, done.modules)(IDS).logits) < 1e-5


def test_exponents_as_scales():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 7, bias=False)).eval()
    original = copy.deepcopy(model)
    dsopt.quantize_(model, FP8Block("ue8m0"))
    assert model[0].weight_scale_inv.dtype == torch.float8_e8m0fnu
    x = torch.randn(3, 20)
    want = rounded_model(original, ["0", "1"], FP8Block("ue8m0"))(x)
    assert relative_l2(model(x).detach(), want.detach()) < 1e-6


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


def test_memory_never_exceeds_the_wide_weights_and_one_layer(monkeypatch):
    monkeypatch.setattr("dsopt.fp8.arithmetic._STRIP", 1 << 9)
    model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(6)]).bfloat16().eval()
    own, layer = 6 * 128 * 128 * 2, 128 * 128 * 2
    with Live(model) as live:
        dsopt.quantize_(model, FP8Block(rows=4))
    assert live.peak <= own + layer
    assert sum(p.nbytes for p in model.parameters()) < 0.55 * own


def test_replaced_weights_are_freed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    wide = [weakref.ref(layer.weight) for layer in model]
    dsopt.quantize_(model)
    assert all(ref() is None for ref in wide)


class Block(nn.Module):
    """Experts in a list, and a router that no name tells."""

    def __init__(self, num_experts=3):
        super().__init__()
        self.choose = nn.Linear(8, num_experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))

    def forward(self, x):
        scores = self.choose(x).softmax(-1)
        return sum(scores[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))


def test_experts_in_a_list_are_linears_and_routers_stay():
    model = Block().eval()
    done = dsopt.quantize_(model)
    assert done.modules == [f"experts.{i}" for i in range(3)] and done.left == {"choose": "a router"}
    assert type(model.choose) is nn.Linear and model(torch.randn(2, 8)).shape == (2, 8)


class Other(nn.Module):
    """Stacked experts without a gate."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 12, 8))
        self.down = nn.Parameter(torch.randn(4, 8, 12))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (x[t] @ self.up[e].T).relu() @ self.down[e].T * weights[t, k, None])
        return out


def test_other_experts_stay_and_say_why():
    model = nn.ModuleDict({"experts": Other(), "out": nn.Linear(8, 8)}).eval()
    done = dsopt.quantize_(model)
    assert done.modules == ["out"] and type(model["experts"]) is Other
    assert done.left == {"experts": "experts with no gate, which FP8Experts have not"}


def test_what_to_skip():
    def model():
        names = "gate", "proj", "lm_head"
        return nn.ModuleDict({"mlp": nn.ModuleDict({name: nn.Linear(4, 4) for name in names})}).eval()

    assert dsopt.quantize_(model()).modules == ["mlp.proj"]
    assert dsopt.quantize_(model(), skip=("*.proj",)).modules == ["mlp.gate", "mlp.lm_head"]
    with pytest.raises(ValueError, match="skip names no module: 'prj'"):
        dsopt.quantize_(model(), skip=(*SKIP, "prj"))
    with pytest.raises(TypeError, match="got the string 'proj'"):
        dsopt.quantize_(model(), skip="proj")


def test_one_module_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    assert dsopt.quantize_(model).modules == ["0"]
    assert model[0] is model[2] and type(model[0]) is FP8Linear


def broken(change):
    def make():
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]).eval()
        change(model)
        return model

    return make


def tied(model):
    model[2].weight = model[1].weight


def overlapping(model):
    model[2].weight.data = model[1].weight.data[:]


def not_finite(model):
    model[2].weight.data[3, 4] = float("nan")


def hooked(model):
    model[2].register_forward_hook(lambda *_: None)


def on_meta(model):
    model[2].to("meta")


def double(model):
    model[2].double()


def replaced_forward(model):
    model[2].forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tied, "is tied to or shares memory with"),
        (overlapping, "2.weight is tied to or shares memory with 1.weight"),
        (not_finite, "2.weight holds NaN or infinity"),
        (hooked, "2 has hooks, which would be lost"),
        (on_meta, "2.weight is on the meta device"),
        (double, "2.weight is torch.float64"),
        (replaced_forward, "the forward of 2 was replaced"),
        (nn.Module.train, "training mode"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_nothing_is_changed_where_a_weight_is_in_the_way(change, reason):
    model = broken(change)()
    modules, before = list(model), [(id(p), p._version) for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        dsopt.quantize_(model)
    assert reason in str(error.value)
    assert list(model) == modules and [(id(p), p._version) for p in model.parameters()] == before
    if change is not nn.Module.train:
        with pytest.raises(ValueError):
            dsopt.compile(model, fp8=True)
        assert dsopt.quantize_(model, skip=("1", "2")).modules == ["0"]


def test_other_arguments_are_refused():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(TypeError, match="format must be an FP8Block"):
        dsopt.quantize_(model, FP8Group())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        dsopt.quantize_("model")
    with pytest.raises(TypeError, match="fp8 must be True, False or an FP8Block"):
        dsopt.compile(model, fp8="e4m3")
    assert type(model[0]) is nn.Linear


def test_a_quantized_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    dsopt.quantize_(model)
    layer = model[0]
    assert dsopt.quantize_(model).modules == [] and model[0] is layer


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_quantizes_a_copy():
    model = decoder(num_hidden_layers=2)
    before = weights(model)
    fast = dsopt.compile(model, fp8=SMALL, strict=True)
    assert unchanged(model, before)
    experts = fast.get_submodule("model.layers.1.mlp.experts")
    assert type(experts) is FP8Experts and type(fast.lm_head) is nn.Linear
    assert fast.lm_head is model.lm_head and fast.model.embed_tokens is model.model.embed_tokens
    same = copy.deepcopy(model)
    dsopt.quantize_(same, SMALL)
    with torch.no_grad():
        want = same(IDS).logits
        assert relative_l2(fast(IDS).logits, want) < 1e-5
        assert relative_l2(model(IDS).logits, want) > 1e-3, "the original is wide"
    report = dsopt.report(fast)
    matched = report.matched["fp8"]
    assert matched[0] == matched[1] > 0 and not report.fallbacks


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_backend_alone_cannot_quantize():
    compiled = torch.compile(nn.Linear(4, 4), backend="dsopt", options={"fp8": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"call dsopt\.quantize_\(model\) first"):
        compiled(rand("cpu", torch.float32)(2, 4))
