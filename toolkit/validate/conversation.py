"""Questions and answers through onnxruntime-genai, with the bundle's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.bundle.genai_config import max_length
from toolkit.errors import BundleError
from toolkit.validate.session import open_model


class Conversation:
    """Every turn begins with a fresh generator over the whole conversation: right on every kind of bundle.

    Raises BundleError for a bundle without a tokenizer.
    """

    def __init__(self, bundle: Path, max_new_tokens: int, on_cpu: bool = False) -> None:
        if not (bundle / names.TOKENIZER_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE}: a synthetic bundle has no words, only speed")
        self._opened = open_model(bundle, on_cpu)
        try:
            self._tokenizer = self._opened.og.Tokenizer(self._opened.model)
        except Exception as problem:  # whatever the runtime throws
            raise BundleError(f"onnxruntime-genai cannot read {names.TOKENIZER_FILE} of {bundle}: {problem}") from None
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer as they come. Raises BundleError if the conversation has outgrown the context."""
        self._messages.append({"role": "user", "content": question})
        text = json.dumps(self._messages, ensure_ascii=False)
        prompt = self._tokenizer.encode(self._tokenizer.apply_chat_template(text, add_generation_prompt=True))
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
