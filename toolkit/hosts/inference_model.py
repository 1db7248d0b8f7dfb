"""`inference_model.json`, by which Foundry Local and AI Toolkit know a model's name and how a prompt is written."""

from __future__ import annotations

from typing import Final

from toolkit.files import json_text
from toolkit.hosts.installable import CONTENT, Installable

INFERENCE_MODEL_FILE: Final = "inference_model.json"
# What Foundry Local asks for where a client says nothing of a limit.
DEFAULT_NEW_TOKENS: Final = 2048


def inference_model(bundle: Installable, name: str) -> str:
    """Returns the file's text: the prompt around one question, and answers as they are."""
    template = None if bundle.prompt is None else {"assistant": CONTENT, "prompt": bundle.prompt}
    return json_text({"Name": name, "PromptTemplate": template})


def budget_notes(bundle: Installable) -> list[str]:
    """Returns a line where prompt and default limit do not fit the length that the bundle has memory for."""
    length = bundle.settings.max_length
    room = length - DEFAULT_NEW_TOKENS
    if room >= bundle.settings.window + DEFAULT_NEW_TOKENS // 8:
        return []
    left = f"leaves {room} to a prompt" if room > 0 else "is less"
    return [
        f"hosts ask for {DEFAULT_NEW_TOKENS} new tokens where a client says nothing, and max_length {length} "
        f"{left}: let clients ask for fewer, or export with a larger --set context_length"
    ]
