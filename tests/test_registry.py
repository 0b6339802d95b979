"""How a kernel is found, chosen and refused."""

import sys
import textwrap

import pytest
import torch

import dsopt.kernels
from dsopt.capture import guard_count
from dsopt.lower import lower
from dsopt.op import REFERENCE, Kernel, Refusal, backends, disabled_backends, explain, kernels, select
from dsopt.ops.linear import gated_mlp
from dsopt.ops.norm import rms_norm
from dsopt.testing import rewritten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ARGS = rms_norm.bind((torch.randn(2, 8), torch.ones(8), 1e-6))


def computes(x, weight, eps):
    return rms_norm.reference(x, weight, eps)


def kernel(backend, priority=0, **more):
    return Kernel("rms_norm", backend, plan=lambda *_: computes, priority=priority, **more)


@pytest.fixture
def only(monkeypatch):
    """Gives op rms_norm these kernels and no others."""

    def give(*found, broken=()):
        ordered = tuple(sorted(found, key=lambda k: -k.priority)), tuple(broken)
        monkeypatch.setattr("dsopt.op.kernels", lambda name: ordered)

    return give


@pytest.fixture
def backend_folder(tmp_path, monkeypatch):
    """A folder beside kernels/torch and kernels/cpu; what is written to it is found."""
    monkeypatch.setattr(dsopt.kernels, "__path__", [*dsopt.kernels.__path__, str(tmp_path)])
    kernels.cache_clear()

    def write(backend: str, text: str, op: str = "rms_norm"):
        folder = tmp_path / backend
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / f"{op}.py").write_text(textwrap.dedent(text))

    yield write
    kernels.cache_clear()
    for name in [n for n in sys.modules if n.startswith(tuple(f"dsopt.kernels.mine{i}" for i in range(3)))]:
        del sys.modules[name]


def test_highest_priority_first(only):
    only(kernel("low", 1), kernel("high", 9), kernel("middle", 5))
    choice = select(rms_norm, ARGS)
    assert choice.kernel.backend == "high" and choice.refused == ()
    assert [label for label, _ in explain(rms_norm, *ARGS)] == [
        "high.rms_norm",
        "middle.rms_norm",
        "low.rms_norm",
        "reference.rms_norm",
    ]


def test_refusals_keep_their_reasons(only):
    only(
        kernel("a", 9, device="cuda"),
        kernel("b", 8, dtypes=frozenset({torch.bfloat16, torch.float16})),
        kernel("c", 7, check=lambda x, w, eps: "width must be a multiple of 16"),
        kernel("d", 6, name="special"),
        broken=[Refusal("e.rms_norm", "import failed: ImportError: no e")],
    )
    choice = select(rms_norm, ARGS)
    reasons = {
        "e.rms_norm": "import failed: ImportError: no e",
        "a.rms_norm": "needs device cuda, got cpu",
        "b.rms_norm": "needs dtype bfloat16, float16, got float32",
        "c.rms_norm": "width must be a multiple of 16",
    }
    assert choice.kernel.label == "d.special"
    assert {r.kernel: r.reason for r in choice.refused} == reasons
    rows = dict(explain(rms_norm, *ARGS))
    assert rows == reasons | {"d.special": "accepts", "reference.rms_norm": "accepts"}


def test_reference_when_all_refuse(only):
    only(kernel("a", check=lambda *_: "never"))
    choice = select(rms_norm, ARGS)
    assert choice.kernel.backend == REFERENCE and choice.fn is rms_norm.reference
    assert choice.refused == (Refusal("a.rms_norm", "never"),)


def test_preferred_backend_goes_first(only):
    only(kernel("fast", 9), kernel("slow", 1))
    assert select(rms_norm, ARGS, prefer="slow").kernel.backend == "slow"
    assert select(rms_norm, ARGS, prefer=REFERENCE).kernel.backend == REFERENCE
    only(kernel("fast", 9), kernel("slow", 1, check=lambda *_: "no"))
    choice = select(rms_norm, ARGS, prefer="slow")
    assert choice.kernel.backend == "fast" and choice.refused == (Refusal("slow.rms_norm", "no"),)


def test_disabled_backends(monkeypatch):
    every = set(backends()) - {REFERENCE}
    assert {"torch", "cpu"} <= every
    monkeypatch.setenv("DSOPT_DISABLE", "cpu")
    assert disabled_backends() == {"cpu"}
    choice = select(rms_norm, ARGS)
    assert choice.kernel.backend != "cpu"
    refused = {r.kernel: r.reason for r in choice.refused}
    assert refused.get("cpu.rms_norm", "disabled").startswith(("disabled", "import failed"))
    monkeypatch.setenv("DSOPT_DISABLE", ",".join(every))
    assert select(rms_norm, ARGS).kernel.backend == REFERENCE
    monkeypatch.setenv("DSOPT_DISABLE", "")
    assert disabled_backends() == frozenset()


def test_disabling_what_does_not_exist_names_what_does(monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "cpu,gpux")
    with pytest.raises(ValueError, match=r"'gpux'.*known backends: .*'cpu'.*'torch'"):
        disabled_backends()
    with pytest.raises(ValueError, match="gpux"):
        torch.ops.dsopt.rms_norm(*ARGS)


def test_a_new_file_is_a_new_kernel(backend_folder):
    backend_folder(
        "mine0",
        """
        from dsopt.op import Kernel

        def plan(*args):
            return lambda x, weight, eps: x * 0 + 7

        KERNELS = (Kernel("rms_norm", "mine0", plan, priority=1000),)
        """,
    )
    assert "mine0" in backends()
    assert select(rms_norm, ARGS).kernel.label == "mine0.rms_norm"
    assert torch.equal(torch.ops.dsopt.rms_norm(*ARGS), torch.full((2, 8), 7.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise OSError('driver too old')", "OSError: driver too old"),
        ("def broken(", "SyntaxError"),
        ("pass", "AttributeError"),
    ],
)
def test_a_broken_file_is_a_refusal(backend_folder, text, reason):
    backend_folder("mine1", text)
    choice = select(rms_norm, ARGS)
    assert choice.kernel.backend != "mine1"
    (refusal,) = [r for r in choice.refused if r.kernel == "mine1.rms_norm"]
    assert reason in refusal.reason and refusal.reason.startswith("import failed")
    assert ("mine1.rms_norm", refusal.reason) in explain(rms_norm, *ARGS)


def test_two_kernels_of_one_name_raise(backend_folder):
    text = """
        from dsopt.op import Kernel

        KERNELS = (Kernel("rms_norm", "mine2", lambda *_: None), Kernel("rms_norm", "mine2", lambda *_: None))
        """
    backend_folder("mine2", text)
    with pytest.raises(ValueError, match=r"two kernels of op rms_norm are called mine2\.rms_norm"):
        kernels("rms_norm")


def test_planned_once_per_graph(only):
    planned = []

    def plan(*args):
        planned.append(args)
        return computes

    only(Kernel("rms_norm", "counts", plan))
    x, w = torch.randn(2, 8), torch.ones(8)
    result = rewritten(lambda x, w: torch.nn.functional.rms_norm(x, (8,), w, 1e-6), x, w)
    planned.clear()
    (use,) = lower(result.graphs[-1], {})
    for _ in range(3):
        result.graphs[-1](x, w)
    assert len(planned) == 1 and isinstance(planned[0][0], torch._subclasses.FakeTensor)
    assert (use.sites, use.calls) == (1, 3)


def test_no_check_may_look_at_a_dynamic_size(only):
    x, w = torch.randn(5, 8), torch.ones(8)
    torch._dynamo.mark_dynamic(x, 0)

    def norm(x, w):
        return torch.nn.functional.rms_norm(x, (8,), w, 1e-6)

    only(kernel("looks", check=lambda x, w, eps: None if x.shape[0] > 4 else "too few rows"))
    graph = rewritten(norm, x, w).graphs[-1]
    before = guard_count(graph)
    with pytest.raises(RuntimeError, match="shape guard"):
        lower(graph, {})
    assert guard_count(graph) > before
    only(kernel("static", check=lambda x, w, eps: None if x.shape[1] > 4 else "too narrow"))
    torch._dynamo.reset()
    assert [use.kernel for use in lower(rewritten(norm, x, w).graphs[-1], {})] == ["static.rms_norm"]


def test_explain_takes_defaults():
    x, w = torch.randn(1, 4), torch.randn(4, 4)
    assert explain(gated_mlp, x, w, w, w)[-1] == ("reference.gated_mlp", "accepts")
