"""Conversations as a checkpoint's apps write them: in its own chat template, the last answer behind its thought.

Whoever exports has probed the template in a process of its own before (evaluate/opens.py).
A model computes otherwise on text in a form it never sees: on Qwen2.5-Coder-0.5B, calibrating in another family's
markers left a quarter more error in GPTQ's matrices (LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from toolkit.bundle.chat_template import shipped_template, special_tokens
from toolkit.bundle.reasoning import BEGIN_OF_THOUGHT, END_OF_THOUGHT
from toolkit.bundle.template_jinja import compile_template, render
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import CheckpointError

_ASSISTANT = "assistant"


class ChatText:
    """Writes conversations in a checkpoint's chat template; without one, what was said, a paragraph each.

    Raises CheckpointError for a template that is none.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        shipped = shipped_template(checkpoint.folder)
        self._source = shipped.source if shipped else ""
        try:
            self._template = compile_template(shipped.text) if shipped else None
        except jinja2.TemplateError as problem:
            raise CheckpointError(f"the chat template in {self._source} cannot be read: {problem}") from None
        self._special = special_tokens(checkpoint.folder)
        vocabulary = checkpoint.side.vocabulary
        known = vocabulary is not None and vocabulary.id_of(END_OF_THOUGHT) is not None
        self._thinks = known or bool(shipped and END_OF_THOUGHT in shipped.text)

    def written(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text: a prompt for all but a last answer, and that answer, `reasoning_content` before
        `content`, to the token that ends it.

        Templates drop thoughts from answers they are given, so the last answer is written as the model would go on.
        Raises CheckpointError where the template refuses the conversation.
        """
        answered = bool(messages) and messages[-1]["role"] == _ASSISTANT
        asked, answer = (messages[:-1], messages[-1]) if answered else (messages, None)
        if self._template is None:
            said = [text for turn in messages for text in (turn.get("reasoning_content"), turn["content"]) if text]
            return "\n\n".join(said)
        try:
            prompt = render(self._template, [dict(turn) for turn in asked], self._special)
        except Exception as problem:  # Whatever a template's expressions raise.
            raise CheckpointError(f"the chat template in {self._source} refuses a conversation: {problem}") from None
        return prompt if answer is None else prompt + self._answer(answer, prompt.rstrip().endswith(BEGIN_OF_THOUGHT))

    def _answer(self, answer: Mapping[str, Any], opened: bool) -> str:
        thought, end = answer.get("reasoning_content") or "", self._special.get("eos_token", "")
        if not self._thinks:
            return "\n\n".join(part for part in (thought, answer["content"]) if part) + end
        begin = "" if opened else f"{BEGIN_OF_THOUGHT}\n"
        return f"{begin}{thought}\n{END_OF_THOUGHT}\n\n{answer['content']}{end}"
