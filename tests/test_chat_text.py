"""Conversations as text in a checkpoint's own template, against transformers and against what an app would send."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from toolkit.bundle.chat_text import ChatText
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import CheckpointError
from toolkit.pipeline.text import token_sequences

ASKED = {"role": "user", "content": "What is 2 + 3?"}
ANSWERED = {"role": "assistant", "reasoning_content": "2 and 3 are 5.", "content": "**5**"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def with_template(tiny_r1: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """tiny-r1 with another template, or none."""

    def made(template: str | None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_r1, folder)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("chat_template")
        path.write_text(json.dumps(config | ({"chat_template": template} if template else {})), encoding="utf-8")
        return folder

    return made


def test_a_thought_stands_where_the_prompt_opens_it(tiny_r1: Path) -> None:
    text = ChatText(open_checkpoint(tiny_r1)).written([ASKED, ANSWERED])
    prompt = AutoTokenizer.from_pretrained(tiny_r1).apply_chat_template(
        [ASKED], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n")
    assert text == f"{prompt}2 and 3 are 5.\n</think>\n\n**5**<｜end▁of▁sentence｜>"


def test_earlier_thoughts_are_the_templates_affair(tiny_r1: Path) -> None:
    """R1's drops them."""
    text = ChatText(open_checkpoint(tiny_r1)).written([ASKED, ANSWERED, ASKED, ANSWERED])
    assert text.count("2 and 3 are 5.") == 1
    assert text.count("**5**") == 2


def test_a_thinking_model_whose_prompt_opens_nothing_gets_both_markers(
    with_template: Callable[[str | None], Path],
) -> None:
    """tiny-r1's vocabulary has the markers."""
    text = ChatText(open_checkpoint(with_template(CHATML))).written([ASKED, ANSWERED])
    assert text.endswith("<|im_start|>assistant\n<think>\n2 and 3 are 5.\n</think>\n\n**5**<｜end▁of▁sentence｜>")


def test_a_model_that_does_not_think_gets_no_markers(stories260k: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    text = ChatText(open_checkpoint(folder)).written([ASKED, ANSWERED])
    assert "<think>" not in text
    assert text.startswith("<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n2 and 3 are 5.\n\n**5**")


def test_without_a_template_what_was_said_stands_alone(with_template: Callable[[str | None], Path]) -> None:
    text = ChatText(open_checkpoint(with_template(None))).written([ASKED, ANSWERED])
    assert text == "What is 2 + 3?\n\n2 and 3 are 5.\n\n**5**"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% if %}", "cannot be read"), ("{{ raise_exception('no users') }}", "refuses a conversation: no users")],
)
def test_a_template_that_fails_is_one_line(
    template: str, message: str, with_template: Callable[[str | None], Path]
) -> None:
    checkpoint = open_checkpoint(with_template(template))
    with pytest.raises(CheckpointError, match=message):
        ChatText(checkpoint).written([ASKED, ANSWERED])


def test_lines_of_messages_are_tokenized_as_they_are_written(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(tiny_r1), tmp_path / "chats.jsonl"
    lines = [{"messages": [ASKED, ANSWERED]}, {"text": "plain <think>"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tiny_r1 / "tokenizer.json"))
    written = [ChatText(checkpoint).written([ASKED, ANSWERED]), "plain <think>"]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in written]
    assert token_sequences(checkpoint, path, 1000, 500) == expected
    assert expected[0][0] == tokenizer.token_to_id("<｜begin▁of▁sentence｜>")


@pytest.mark.parametrize(
    "line", ['{"messages": 3}', '{"messages": [{"role": "user"}]}', '{"messages": [4]}', "[]", "7"]
)
def test_lines_of_another_kind_are_refused(line: str, tiny_r1: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"chats.jsonl"):
        token_sequences(open_checkpoint(tiny_r1), path, 100, 50)


@pytest.mark.parametrize("name", ["calibration", "reasoning"])
def test_the_products_own_texts_are_conversations_with_thoughts(name: str, tiny_r1: Path) -> None:
    lines = (tiny_r1.parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        asked, answered = json.loads(line)["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        assert asked["content"] and answered["reasoning_content"] and answered["content"]
