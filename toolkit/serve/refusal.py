"""Requests that are refused, as OpenAI's API says so."""

from __future__ import annotations

import re
from typing import Final

from toolkit.errors import ToolkitError
from toolkit.typed_json import Json

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Two folders or more from the root of a machine.
_PATH: Final = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][\w.@ -]+){2,}")


class Refusal(ToolkitError):
    """A request that is not answered: the HTTP status, and the parameter at fault where there is one."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Json]:
        """Returns the JSON object that says so."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def without_paths(message: str) -> str:
    """A message without the places on this machine that it names."""
    return _PATH.sub("…", message)
