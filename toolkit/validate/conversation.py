"""Questions and answers through onnxruntime-genai, with the bundle's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.bundle.genai_config import max_length, read_genai_config
from toolkit.errors import BundleError
from toolkit.validate.session import open_model


class Conversation:
    """Every turn begins with a fresh generator over the whole conversation: right on every kind of bundle.

    Raises BundleError for a bundle without a tokenizer.
    """

    def __init__(self, bundle: Path, max_new_tokens: int) -> None:
        if not (bundle / names.TOKENIZER_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE}: a synthetic bundle has no words, only speed")
        self._og, self._model, _ = open_model(bundle)
        self._tokenizer = self._og.Tokenizer(self._model)
        self._max_new_tokens = max_new_tokens
        self._config = read_genai_config(bundle)
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer as they come. Raises BundleError if the conversation has outgrown the context."""
        self._messages.append({"role": "user", "content": question})
        text = json.dumps(self._messages, ensure_ascii=False)
        prompt = self._tokenizer.encode(self._tokenizer.apply_chat_template(text, add_generation_prompt=True))
        if max_length(self._config, len(prompt), 1) == max_length(self._config, len(prompt), 0):
            self._messages.pop()
            raise BundleError(
                f"the conversation has {len(prompt)} tokens, the bundle's context "
                f"{self._config['model']['context_length']}: start anew"
            )
        answer = ""
        for piece in self._stream(prompt):
            answer += piece
            yield piece
        self._messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt: Any) -> Iterator[str]:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length(self._config, len(prompt), self._max_new_tokens))
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(prompt)
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
