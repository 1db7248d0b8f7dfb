"""Published tokenizers' shapes through onnxruntime-genai: encoded as `tokenizers` does, or exceptions with a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizer_shapes import EVERY_TOKEN, REFUSED, SHAPES, Shape
from toolkit.errors import UnsupportedError
from toolkit.evaluate import encodes
from toolkit.evaluate.encodes import checked_tokenizer

_READ = [shape for shape in SHAPES if shape.differs != REFUSED]
_NOT_READ = [shape for shape in SHAPES if shape.differs == REFUSED]


def _made(shape: Shape, folder: Path) -> tuple[Path, dict[str, object]]:
    path = folder / "tokenizer.json"
    shape.make().save(str(path))
    known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return path, {"tokenizer_class": shape.tokenizer_class, **known, **shape.config}


def _named(differs: list[str], texts: list[str]) -> tuple[str, ...]:
    """The names, one for all added tokens where all of them are."""
    added = [name for name in texts if name.startswith("added token ")]
    if set(added) <= set(differs):
        return (*(name for name in differs if name not in added), EVERY_TOKEN)
    return tuple(differs)


def test_there_are_fifty_and_most_are_alike() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) >= 50
    assert sum(not shape.differs for shape in SHAPES) >= 24


@pytest.mark.parametrize("shape", _READ, ids=lambda shape: shape.name)
def test_what_genai_reads_is_encoded_as_tokenizers_does_or_named(shape: Shape, tmp_path: Path) -> None:
    path, config = _made(shape, tmp_path)
    made = encodes._checked({"tokenizer": str(path), "config": config})
    assert isinstance(made, dict) and made["problem"] == ""
    assert _named(made["differs"], list(encodes._probes(path)[0])) == shape.differs


@pytest.mark.parametrize("shape", _NOT_READ, ids=lambda shape: shape.name)
def test_what_genai_does_not_read_is_refused_in_a_line(shape: Shape, tmp_path: Path) -> None:
    path, config = _made(shape, tmp_path)
    with pytest.raises(UnsupportedError, match=r"onnxruntime-genai (cannot use|encodes)") as caught:
        checked_tokenizer(path, config)
    assert "\n" not in str(caught.value)
