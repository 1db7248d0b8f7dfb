"""The pad id: one that does not stand in text, whatever the checkpoint pads with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.bundle.genai_config import pad_token_id
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.side_files import Generation, SideFiles, Vocabulary

ROWS = 1024
ADDED = {"<|im_end|>": 2, "<|im_start|>": 1, "<repo_name>": 3, "<file_sep>": 4, "</s>": 0}


@pytest.mark.parametrize(
    ("added", "used", "expected"),
    [
        ({**ADDED, "<|fim_pad|>": 7}, range(ROWS), 7),
        (ADDED, range(ROWS - 3), ROWS - 1),
        (ADDED, (i for i in range(ROWS) if i != 500), 500),
        # All rows are used, as in SmolLM2, which pads with what ends its turns: its templates write the first two.
        (ADDED, range(ROWS), 4),
        ({"<|im_end|>": 2, "<|im_start|>": 1}, range(ROWS), 2),
    ],
    ids=["a reserved token", "the last row", "a row between", "a spare token", "none"],
)
def test_pad_is_what_never_stands_in_text(added: dict[str, int], used: range, expected: int, tiny_r1: Path) -> None:
    config = replace(open_checkpoint(tiny_r1).config, eos_token_ids=(2,), bos_token_id=1, pad_token_id=2)
    assert config.vocab_size == ROWS
    side = SideFiles(
        generation=Generation(eos_token_ids=(0,)),
        vocabulary=Vocabulary(added, {}, frozenset(used)),
        templates=("{{ '<|im_start|>' + messages[0].content + '<|im_end|>' }}",),
    )
    assert pad_token_id(config, side) == expected
