"""Questions and answers through onnxruntime-genai, with the bundle's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.bundle.genai_config import max_length
from toolkit.errors import BundleError
from toolkit.evaluate.session import OpenModel, open_model


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

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages of `role` and `content` as one prompt. Raises BundleError where there is no template for them."""
        text = json.dumps(messages, ensure_ascii=False)
        try:
            return str(self.tokenizer.apply_chat_template(text, add_generation_prompt=add_generation_prompt))
        except Exception as problem:  # whatever the runtime throws
            reason = str(problem).splitlines()[0][:200]
            raise BundleError(f"onnxruntime-genai cannot apply the chat template of {self._bundle}: {reason}") from None


class Conversation:
    """Every turn begins with a fresh generator over the whole conversation: right on every kind of bundle.

    Raises BundleError for a bundle without a tokenizer.
    """

    def __init__(self, bundle: Path, max_new_tokens: int, on_cpu: bool = False) -> None:
        if not (bundle / names.TOKENIZER_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE}: a synthetic bundle has no words, only speed")
        self._opened = open_model(bundle, on_cpu)
        self._template = ChatTemplate(bundle, self._opened)
        self._tokenizer = self._template.tokenizer
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer as they come. Raises BundleError if the conversation has outgrown the context."""
        self._messages.append({"role": "user", "content": question})
        prompt = self._tokenizer.encode(self._template.render(self._messages))
        config = self._opened.config
        if max_length(config, len(prompt), 1) == max_length(config, len(prompt), 0):
            self._messages.pop()
            raise BundleError(
                f"the conversation has {len(prompt)} tokens, the bundle's context "
                f"{config['model']['context_length']}: start anew"
            )
        answer = ""
        for piece in self._stream(prompt):
            answer += piece
            yield piece
        self._messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt: Any) -> Iterator[str]:
        generator = self._opened.generator(prompt, self._max_new_tokens)
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
