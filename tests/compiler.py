"""Whether QNN's compiler is on this machine."""

from __future__ import annotations

import pytest

from toolkit.epcontext import htp
from toolkit.errors import MachineError


def _why_not() -> str:
    """What this machine lacks, empty if nothing."""
    try:
        htp.htp_version()
    except MachineError as problem:
        return str(problem)
    return ""


needs_compiler = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "the compiler is here")
