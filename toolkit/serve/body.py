"""The body of a request: bounded in size and time, and a JSON object."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from starlette.requests import Request

from toolkit.files import is_unicode
from toolkit.serve.refusal import Refusal
from toolkit.typed_json import Json

MOST_BODY_BYTES: Final = 4 << 20
_BODY_S: Final = 30.0


async def read_body(request: Request) -> dict[str, Json]:
    """Returns the JSON object of a request's body, without the keys that are null. Raises Refusal for anything else."""
    text = await _text(request)
    try:
        raw: Json = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refusal("the body is not JSON: expected one object") from None
    if not isinstance(raw, dict):
        raise Refusal("the body is not a JSON object")
    if not is_unicode(raw):
        raise Refusal("the body holds half a surrogate pair, which is no text")
    return {key: value for key, value in raw.items() if value is not None}


async def _text(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BODY_BYTES:
                    raise Refusal(f"the body is larger than {MOST_BODY_BYTES} bytes", 413)
    except TimeoutError:
        raise Refusal(f"the body did not arrive within {_BODY_S:.0f} s", 408) from None
    return bytes(body)


def _no_number(word: str) -> float:
    raise ValueError(word)
