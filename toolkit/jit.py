"""numba, which compiles inner loops over arrays to machine code, or what is said where it is missing."""

from __future__ import annotations

from typing import Any, Final, TypedDict

from toolkit.errors import MachineError


class CompilerOptions(TypedDict, total=False):
    """What numba's `njit` is told: to let other threads run, to divide by zero as numpy does, and which liberties it
    may take with float arithmetic."""

    nogil: bool
    error_model: str
    fastmath: set[str]
    inline: str


def _njit() -> Any:
    """numba's compiler, or None where it is missing: whoever runs bundles and makes none does without."""
    try:
        from numba import njit
    except ImportError:
        return None
    return njit


_NJIT: Final = _njit()


def require_compiler(what: str = "quantizing") -> None:
    """Returns where loops can be compiled. Raises MachineError, which names `what` needs them and what to install,
    where numba is missing."""
    if _NJIT is None:
        raise MachineError(f"{what} needs numba, which is not installed: pip install 'onnx-distill-toolkit[convert]'")


def machine_code(function: Any, options: CompilerOptions, what: str) -> Any:
    """`function` as machine code, kept on disk for the next run where some folder for it can be written.

    Without numba it comes back as something that raises MachineError when it is called.
    """
    if _NJIT is None:
        return lambda *_: require_compiler(what)
    try:
        return _NJIT(cache=True, **options)(function)
    except RuntimeError:
        return _NJIT(**options)(function)
