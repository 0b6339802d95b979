"""The native extension, or an ImportError that says how to get it."""

try:
    from dsopt import _cpu
except ImportError as error:
    raise ImportError(
        "the native CPU kernels are not built; reinstall dsopt where a C++17 compiler and pybind11 are found "
        f"({error})"
    ) from error

__all__ = ["_cpu"]
