"""The machine code of the native kernels: each variant has the instructions it promises, and no others' registers."""

import collections
import re
import shutil
import subprocess

import pytest

from dsopt import _cpu

KERNELS = [name for name, member in vars(_cpu).items() if callable(member) and not isinstance(member, type)]
KERNELS = sorted(set(KERNELS) - {"isa", "isas", "set_isa"})
VARIANTS = ("portable", "avx2", "avx512", "avx512_vbmi", "avx512_bf16")
# for all other kernels avx512_vbmi runs avx512
FP8_KERNELS = {"multi_linear", "moe_experts"}
VEX = r"^v"  # every instruction of AVX and later, and of those a program may use no other
# what a kernel must contain, for each variant; rope takes its pairs, which may lie anywhere, one by one
VECTORS = {"portable": r"%xmm", "avx2": r"%ymm", "avx512": r"%zmm"}
VECTORS |= {"avx512_vbmi": r"%zmm", "avx512_bf16": r"%zmm"}
FUSED = {
    "avx2": r"^vfmadd\w+ps .*%ymm",
    "avx512": r"^vfmadd\w+ps .*%zmm",
    "avx512_vbmi": r"^vfmadd\w+ps .*%zmm",
    "avx512_bf16": r"^vfmadd\w+ps .*%zmm",
}
BFLOAT16_PRODUCTS = {"multi_linear", "moe_experts"}
# how the bytes of FP8 weights are widened
FP8_LOOKUP = {
    "avx2": r"^vpshufb .*%ymm",
    "avx512": r"^vpshufb .*%zmm",
    "avx512_vbmi": r"^vperm[it]2b .*%zmm",
    "avx512_bf16": r"^vperm[it]2b .*%zmm",
}
# what no code of a variant may contain; beyond these the compiler was given no permission
FOREIGN = {
    "portable": VEX,
    "avx2": r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b",
    "avx512": r"bf16|^vperm(b|i2b|t2b) ",
    "avx512_vbmi": r"bf16",
    "avx512_bf16": r"(?!)",
}

pytestmark = [
    # any machine that could compile the extension has objdump; one that got a wheel may not
    pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed"),
    pytest.mark.skipif("avx2" not in _cpu.isas(), reason="the variants are for x86-64"),
]


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """The instructions of each function of the extension, by demangled name."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _cpu.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = collections.defaultdict(list)  # clones of one function share a demangled name
    for name, body in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n?)*)", text, re.M):
        found[re.sub(r" \[clone .*\]$", "", name)] += re.findall(r"^ *[0-9a-f]+:\t(.*?)\s*$", body, re.M)
    return found


def reachable(functions: dict[str, list[str]], start: str) -> set[str]:
    """The functions that `start` calls, jumps to or takes the address of, and those that these do."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for line in functions[name]:
            todo += [re.sub(r"(\+0x[0-9a-f]+)$| \[clone .*\]", "", t) for t in re.findall(r"<(.+)>$", line)]
    return seen


def matching(functions, names, pattern: str) -> list[str]:
    return [f"{name}: {line}" for name in names for line in functions[name] if re.search(pattern, line)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_has_the_instructions_of_its_variant(functions, kernel, variant):
    entry = [n for n in functions if re.match(rf"dsopt::{variant}::{kernel}\(", n)]
    assert len(entry) == (variant != "avx512_vbmi" or kernel in FP8_KERNELS), entry
    if not entry:
        return
    own = {n for n in reachable(functions, entry[0]) if not n.endswith("@plt")}
    strangers = [n for n in own for v in VARIANTS if v != variant and f"dsopt::{v}::" in n]
    assert not strangers, "code of another variant"
    if kernel != "rope":
        assert matching(functions, own, VECTORS[variant])
        assert variant not in FUSED or matching(functions, own, FUSED[variant])
    if kernel in FP8_KERNELS and variant in FP8_LOOKUP:
        assert matching(functions, own, FP8_LOOKUP[variant])
    if kernel in BFLOAT16_PRODUCTS and variant == "avx512_bf16":
        assert matching(functions, own, r"^vdpbf16ps .*%zmm")
    assert not matching(functions, own, FOREIGN[variant])[:3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_code_of_a_variant_is_foreign_to_it(functions, variant):
    """That of functions no kernel was seen to reach, too."""
    own = [n for n in functions if f"dsopt::{variant}::" in n]
    assert len(own) > (len(FP8_KERNELS) if variant == "avx512_vbmi" else len(KERNELS))
    assert not matching(functions, own, FOREIGN[variant])[:3]


def test_code_outside_the_variants_runs_on_every_processor(functions):
    """The choice among them is made there, on whatever processor it is."""
    shared = [n for n in functions if not any(f"dsopt::{v}::" in n for v in VARIANTS)]
    assert any("active_isa" in n for n in shared)
    assert not matching(functions, shared, VEX)[:3]
