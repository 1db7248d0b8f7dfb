"""Messages as one prompt, by a bundle's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit import names
from toolkit.bundle.reasoning import END_OF_THOUGHT
from toolkit.errors import BundleError
from toolkit.evaluate.session import OpenModel
from toolkit.typed_json import Json


class ChatTemplate:
    """A bundle's chat template, as onnxruntime-genai renders it, and the tokenizer that it comes with.

    Raises BundleError for a tokenizer that onnxruntime-genai cannot read.
    """

    def __init__(self, bundle: Path, opened: OpenModel) -> None:
        self._bundle = bundle
        try:
            self.tokenizer = opened.og.Tokenizer(opened.model)
        except Exception as problem:  # whatever the runtime throws
            raise BundleError(f"onnxruntime-genai cannot read {names.TOKENIZER_FILE} of {bundle}: {problem}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Json]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Json]] = (),
    ) -> str:
        """Messages of `role` and `content` as one prompt, and the tools that the model may call, where the template has
        a place for them. Raises BundleError where there is no template for the messages."""
        text = json.dumps(messages, ensure_ascii=False)
        described = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(text, add_generation_prompt=add_generation_prompt, **described)
            )
        except Exception as problem:  # whatever the runtime throws
            reason = str(problem).splitlines()[0][:200]
            raise BundleError(f"onnxruntime-genai cannot apply the chat template of {self._bundle}: {reason}") from None


def without_thoughts(messages: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Messages as they may stand in a prompt: earlier thoughts never enter one, as reasoning models are trained."""
    return [
        {**message, "content": content.rpartition(END_OF_THOUGHT)[2].lstrip()}
        if message.get("role") == "assistant" and isinstance(content := message.get("content"), str)
        else dict(message)
        for message in messages
    ]
