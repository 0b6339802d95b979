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
    "avx512": r"^v\w*bf16|^vperm(b|i2b|t2b) ",
    "avx512_vbmi": r"^v\w*bf16",
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


def loops(instructions: list[tuple[str, str]]) -> list[list[str]]:
    """What lies between a jump backwards and where it goes; instructions: address and text of each, in order."""
    at = {address: i for i, (address, _) in enumerate(instructions)}
    found = []
    for i, (_, text) in enumerate(instructions):
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        if jump and at.get(jump[1], i) < i:
            found.append([t for _, t in instructions[at[jump[1]] : i + 1]])
    return found


# Vector instructions for 32 weights in FP8, loads and multiply-adds included. In the registers of AVX-512 there are two
# multiply-adds, two shifts or masks and one interleaving for them, and half a load; the rest looks up bytes.
FP8_INSTRUCTIONS = {"avx2": 24, "avx512": 12, "avx512_vbmi": 9, "avx512_bf16": 9}


@pytest.mark.parametrize("variant", FP8_INSTRUCTIONS)
def test_how_many_instructions_widen_and_multiply_fp8(variant):
    """In the innermost loop of one token: each row of its tile takes four vectors of weights, four multiply-adds."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _cpu.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows, lanes = (4, 8) if variant == "avx2" else (8, 16)
    counts = []
    for body in re.findall(rf"^[0-9a-f]+ <.*dsopt::{variant}::fp8_rows<1>.*>:\n((?:.+\n?)*)", text, re.M):
        for loop in loops(re.findall(r"^ *([0-9a-f]+):\t(.*?)\s*$", body, re.M)):
            if sum(t.startswith("vfmadd") for t in loop) == 4 * rows:
                counts.append(sum(t.startswith("v") for t in loop) * 32 / (4 * lanes * rows))
    assert counts and max(counts) <= FP8_INSTRUCTIONS[variant], counts


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
