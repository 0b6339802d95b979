"""Triton kernels on CPU tensors: Triton's interpreter, put right where it departs from what a GPU computes.

Triton's interpreter runs a kernel program by program in NumPy. Version 3.6 keeps bfloat16 as uint16 and float8
as uint8 and then computes with those integers: products, sums and comparisons of bfloat16 are meaningless,
float32 is truncated to bfloat16, a tenth of the roundings to float8 is wrong and nothing saturates there. Under
NumPy 2.4 and newer a loop over a value known only at run time fails. `triton_interpreter` replaces those methods of
Triton's test tool while it is open and puts them back afterwards. Patching another library is the purpose here; but
for `dsopt.aot`, which compiles in place of launching, nothing else in dsopt does so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from dsopt.gpu import Capability, imitate
from dsopt.op import Kernel

# Triton's name of a type that NumPy lacks -> PyTorch's type, which knows how to convert it
_STORED = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
_BITS = {"bf16": torch.uint16, "fp8e4nv": torch.uint8, "fp8e5": torch.uint8}


@contextlib.contextmanager
def triton_interpreter(capability: Capability = (9, 0)) -> Iterator[None]:
    """While it is open, every launch of a Triton kernel is interpreted, on CPU tensors, in this process.

    capability: of the GPU that kernels are to choose their tiles for, as (major, minor).

    What it computes: arithmetic, comparisons, minima and maxima, sums and scans of bfloat16 as float32 rounded to
    the nearest even; `tl.dot` of bfloat16 and float8 with exact products summed in float32; casts to float8 e4m3 and
    e5m2 rounded to the nearest even and saturated, as the conversions of compute capability 8.9 and newer do; NaN
    stays NaN; `tl.maximum` and `tl.minimum` prefer a number to NaN. Needs triton, no GPU, and no environment
    variable. Other float8 types stay as Triton has them. Atomics on bfloat16 raise NotImplementedError.
    """
    from triton.runtime import interpreter, jit

    with contextlib.ExitStack() as stack:
        stack.enter_context(imitate(capability))
        replace = replacer(stack)
        _interpret_launches(replace, interpreter, jit)
        _repair_scalars(replace, interpreter)
        _repair_builder(replace, interpreter)
        _repair_reductions(replace, interpreter)
        yield


def interpreted(kernel: Kernel, capability: Capability = (9, 0)) -> Kernel:
    """The same kernel for CPU tensors: it is planned and called inside `triton_interpreter(capability)`."""

    def plan(*args):
        with triton_interpreter(capability):
            fn = kernel.plan(*args)

        def call(*args):
            with triton_interpreter(capability):
                return fn(*args)

        return call

    def check(*args):
        with triton_interpreter(capability):
            return kernel.check(*args)

    return dataclasses.replace(kernel, plan=plan, check=check, device="cpu")


def replacer(stack: contextlib.ExitStack) -> Callable[[Any, str, Callable], None]:
    """`replace(owner, name, make)` sets owner.name to make(what it was), until the stack closes.

    Raises AttributeError for a name that this version of Triton does not have, unless `added` says it is new.
    """

    def replace(owner: Any, name: str, make: Callable, added: bool = False) -> None:
        new = make(None if added else getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, new, create=added))

    return replace


def _interpret_launches(replace: Callable, interpreter: Any, jit: Any) -> None:
    """Functions that were compiled ones when `triton.jit` made them are interpreted as well."""
    from triton import language

    def run(compiled):
        return lambda self, *args, **kwargs: interpreter.InterpretedFunction(self.fn).run(*args, **kwargs)

    def call(compiled):
        return lambda self, *args, **kwargs: interpreter.InterpretedFunction(self.fn).rewrite()(
            *args, **kwargs
        )

    def patch_lang(original):
        # Triton patches its language for each function called and leaves it so, which breaks compiling later; once a
        # launch, for both names of the language, is enough and is undone
        both = SimpleNamespace(__globals__={"tl": language, "core": language.core})
        return lambda fn: original(both)

    replace(jit.JITFunction, "run", run)
    replace(jit.JITFunction, "__call__", call)
    replace(interpreter, "_patch_lang", patch_lang)
    for name, member in list(vars(language.tensor).items()):
        if isinstance(member, jit.JITFunction):  # x.sum(0): only plain functions become methods
            replace(language.tensor, name, lambda fn: lambda *args, **kwargs: fn(*args, **kwargs))


def _repair_scalars(replace: Callable, interpreter: Any) -> None:
    """Scalars are arrays of one element, which NumPy >= 2.4 does not take for the bounds of a range."""

    def patch_tensor(original):
        def patch(cls, scope):
            original(cls, scope)
            scope.set_attr(cls, "__index__", lambda self: self.handle.data.item())

        return patch

    replace(interpreter, "_patch_lang_tensor", patch_tensor)


def _name(handle: Any) -> str:
    return handle.dtype.scalar.name


def _decode(handle: Any) -> np.ndarray:
    """The values of an interpreted tensor, as float32 where NumPy does not have their type."""
    if _name(handle) not in _STORED:
        return handle.data
    stored = torch.from_numpy(np.array(handle.data))
    return stored.view(_STORED[_name(handle)]).float().numpy()


def _encode(values: np.ndarray, dtype: Any, interpreter: Any) -> Any:
    """An interpreted tensor of a scalar type of Triton's that holds these values."""
    if dtype.name in _STORED:
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        stored = _STORED[dtype.name]
        if stored is not torch.bfloat16:
            wide = wide.clamp(torch.finfo(stored).min, torch.finfo(stored).max)
        values = wide.to(stored).view(_BITS[dtype.name]).numpy()
    else:
        values = values.astype(interpreter._get_np_dtype(dtype))
    return interpreter.TensorHandle(values, dtype)


def _repair_builder(replace: Callable, interpreter: Any) -> None:
    """The operations of one program: casts, arithmetic, products of matrices."""
    from triton._C.libtriton import ir
    from triton.language import bfloat16, float32, int1

    builder = interpreter.InterpreterBuilder

    def cast(original):
        def cast_impl(self, src, dst_type):
            if _STORED.keys() & {_name(src), dst_type.scalar.name}:
                return _encode(_decode(src), dst_type.scalar, interpreter)
            return original(self, src, dst_type)

        return cast_impl

    def cast_rounding(original):
        def create_fp_to_fp(self, src, dst_type, rounding_mode):
            if rounding_mode in (None, ir.ROUNDING_MODE.RTNE) and (
                _STORED.keys() & {_name(src), dst_type.scalar.name}
            ):
                return _encode(_decode(src), dst_type.scalar, interpreter)
            return original(self, src, dst_type, rounding_mode)

        return create_fp_to_fp

    def wide(original):
        """Computes in float32 what has a bfloat16 operand; `original` takes one to three of them first."""

        def compute(self, *args):
            handles = [a for a in args if isinstance(a, interpreter.TensorHandle)]
            if "bf16" not in map(_name, handles):
                return original(self, *args)
            args = [
                interpreter.TensorHandle(_decode(a), float32) if any(a is h for h in handles) else a
                for a in args
            ]
            out = original(self, *args)
            if out.data.dtype == np.bool_:
                return interpreter.TensorHandle(out.data, int1)
            return _encode(out.data, bfloat16, interpreter)

        return compute

    def dot(original):
        def create_dot(self, a, b, d, *rest):
            a, b = (
                interpreter.TensorHandle(_decode(x), float32) if _name(x) in _STORED else x for x in (a, b)
            )
            return original(self, a, b, d, *rest)

        return create_dot

    def atomic(original):
        def create_atomic_rmw(self, rmw_op, ptr, val, *rest):
            if _name(val) == "bf16":
                raise NotImplementedError("atomics on bfloat16 cannot be interpreted; accumulate in float32")
            return original(self, rmw_op, ptr, val, *rest)

        return create_atomic_rmw

    def constant(original):
        return lambda self, value: _encode(np.array([value], np.float32), bfloat16, interpreter)

    replace(builder, "get_bf16", constant, added=True)
    replace(builder, "cast_impl", cast)
    replace(builder, "create_fp_to_fp", cast_rounding)
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        replace(builder, name, wide)
    replace(builder, "create_dot", dot)
    replace(builder, "create_atomic_rmw", atomic)
    replace(builder, "create_maxnumf", lambda _: lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax))
    replace(builder, "create_minnumf", lambda _: lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin))


def _repair_reductions(replace: Callable, interpreter: Any) -> None:
    """Reductions and scans of bfloat16 run in float32 and are rounded once, at the end."""
    from triton.language import bfloat16, block_type, float32, tensor

    def typed(handle: Any, like: Any) -> Any:
        is_block = like.type.is_block()
        return tensor(handle, block_type(handle.dtype, list(like.shape)) if is_block else handle.dtype)

    def widened(x: Any) -> Any:
        if x.dtype.name != "bf16":
            return x
        return typed(interpreter.TensorHandle(_decode(x.handle), float32), x)

    def narrowed(x: Any, source: Any) -> Any:
        if source.dtype.name != "bf16":
            return x
        return typed(_encode(x.handle.data, bfloat16, interpreter), x)

    def apply(original):
        def apply_wide(self, operands):
            if not isinstance(operands, tuple):
                return self.apply((operands,))[0]
            results = original(self, tuple(map(widened, operands)))
            return tuple(map(narrowed, results, operands))

        return apply_wide

    replace(interpreter.ReduceScanOpInterface, "apply", apply)
