"""numba, which compiles inner loops over arrays to machine code, or what is said where it is missing.

It is imported when a loop is first called: most commands run none, and it takes as long as all else they import.
"""

from __future__ import annotations

from functools import cache
from threading import RLock
from typing import Any, Final, TypedDict

from toolkit.errors import MachineError


class CompilerOptions(TypedDict, total=False):
    """What numba's `njit` is told: to let other threads run, to divide by zero as numpy does, and which liberties it
    may take with float arithmetic."""

    nogil: bool
    error_model: str
    fastmath: set[str]
    inline: str


@cache
def _njit() -> Any:
    """numba's compiler, or None where it is missing: whoever runs bundles and makes none does without."""
    try:
        from numba import njit
    except ImportError:
        return None
    return njit


def require_compiler(what: str = "quantizing") -> None:
    """Returns where loops can be compiled. Raises MachineError, which names `what` needs them and what to install,
    where numba is missing."""
    if _njit() is None:
        raise MachineError(f"{what} needs numba, which is not installed: pip install 'onnx-distill-toolkit[convert]'")


class _Loop:
    """A function that is handed to numba when it is first called, and from then on stands in its module as numba made
    it, so that loops of the same module can call it."""

    # A loop that is handed over takes those of its module along, and two threads may call two of them at once.
    _lock: Final = RLock()

    def __init__(self, function: Any, options: CompilerOptions, what: str) -> None:
        self._function, self._options, self._what = function, options, what
        self._made: Any = None
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns; MachineError without numba."""
        return self._handed_over()(*arguments)

    def _handed_over(self) -> Any:
        """The function as numba made it."""
        with self._lock:
            if self._made is None:
                require_compiler(self._what)
                self._made = self._by_numba()
                for name, value in list(self._function.__globals__.items()):
                    if isinstance(value, _Loop):
                        self._function.__globals__[name] = value._handed_over()
            return self._made

    def _by_numba(self) -> Any:
        """Kept on disk for the next run where some folder for it can be written."""
        njit = _njit()
        try:
            return njit(cache=True, **self._options)(self._function)
        except RuntimeError:
            return njit(**self._options)(self._function)


def machine_code(function: Any, options: CompilerOptions, what: str) -> Any:
    """`function` as machine code, kept on disk for the next run where some folder for it can be written.

    Without numba it comes back as something that raises MachineError when it is called.
    """
    return _Loop(function, options, what)
