"""What stands beside the weights: accepted, refused in one line, and what a bundle makes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from toolkit.bundle.chat_template import shipped_template
from toolkit.bundle.stop_tokens import stop_tokens
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.side_files import Generation, Sampling, SideFiles, Vocabulary, read_side_files
from toolkit.errors import CheckpointError, UnsupportedError

VOCAB_SIZE = 1024
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"
EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture
def folder(tiny_r1: Path, tmp_path: Path) -> Path:
    """tiny-r1's small files alone."""
    for path in tiny_r1.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def _set(path: Path, **values: Any) -> None:
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | values, ensure_ascii=False), encoding="utf-8")


def test_null_is_as_if_it_were_absent(folder: Path) -> None:
    """transformers' GenerationConfig(temperature=None).save_pretrained writes such files."""
    (folder / "generation_config.json").unlink()
    without = read_side_files(folder, VOCAB_SIZE).generation
    keys = ("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_length")
    _set(folder / "generation_config.json", **dict.fromkeys(keys))
    assert read_side_files(folder, VOCAB_SIZE).generation == without == Generation()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        _set(folder / file, eos_token=None, chat_template=None)
    side = read_side_files(folder, VOCAB_SIZE)
    assert side.eos_token == {} and side.templates == ()


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("eos_token_id", 764.0, (764,)),
        ("eos_token_id", [764.0, 3], (764, 3)),
        ("pad_token_id", -1, None),
        ("bos_token_id", -1, None),
        ("bos_token_id", [5], 5),
    ],
)
def test_ids_as_other_programs_write_them(folder: Path, key: str, value: object, read: object) -> None:
    _set(folder / "generation_config.json", **{key: value})
    generation = read_side_files(folder, VOCAB_SIZE).generation
    assert getattr(generation, "eos_token_ids" if key == "eos_token_id" else key) == read


def test_minus_one_is_no_top_k(folder: Path) -> None:
    _set(folder / "generation_config.json", top_k=-1)
    assert read_side_files(folder, VOCAB_SIZE).generation.sampling.top_k == 0


def test_ways_to_write_that_have_no_setting_are_said(folder: Path, tiny_r1: Path) -> None:
    shutil.copy(tiny_r1 / "model.safetensors", folder)
    _set(folder / "generation_config.json", num_beams=1, typical_p=1.0, bad_words_ids=[], suppress_tokens=None)
    assert open_checkpoint(folder).notes == ()
    _set(folder / "generation_config.json", num_beams=4, suppress_tokens=[1])
    (note,) = open_checkpoint(folder).notes
    assert "sets num_beams, suppress_tokens, for which onnxruntime-genai has no setting" in note


def test_tokens_that_another_file_lists_are_tokens(folder: Path) -> None:
    """As transformers adds them: those that tokenizer.json lacks, at the ids that come next."""
    _set(folder / "added_tokens.json", **{"<|im_end|>": 770, "<think>": 5, "<|other|>": 5, "<|apart|>": 900})
    listed = {"771": {"content": "<|eot_id|>", "special": True}}
    _set(folder / "tokenizer_config.json", added_tokens_decoder=listed, eos_token="<|im_end|>")
    side = read_side_files(folder, VOCAB_SIZE)
    assert side.vocabulary is not None and side.vocabulary.elsewhere == {"<|im_end|>": 770, "<|eot_id|>": 771}
    assert side.vocabulary.id_of("<think>") != 5 and {770, 771} <= side.vocabulary.ids
    assert 770 in [token.id for token in stop_tokens(side, (), VOCAB_SIZE)]


def test_an_end_of_text_that_is_no_token_is_said(folder: Path, tiny_r1: Path) -> None:
    shutil.copy(tiny_r1 / "model.safetensors", folder)
    _set(folder / "tokenizer_config.json", eos_token="<|nope|>")
    (note,) = open_checkpoint(folder).notes
    assert "names '<|nope|>' as eos_token, which the vocabulary does not have" in note


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"default": "a", "tool_use": "b"}, ("a", "b")),
        ([{"name": "default", "template": "a"}], ("a",)),
        ("a", ("a",)),
        (" \n", ()),
        ([], ()),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_every_form_of_templates_is_read(folder: Path, file: str, value: object, texts: tuple[str, ...]) -> None:
    _set(folder / "tokenizer_config.json", chat_template=None)
    _set(folder / file, chat_template=value)
    assert read_side_files(folder, VOCAB_SIZE).templates == texts
    shipped = shipped_template(folder)
    assert (shipped.text if shipped else None) == (texts[0] if texts else None)


def test_what_is_said_is_read(folder: Path) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    sampling |= {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_length": 2}
    _set(folder / "generation_config.json", eos_token_id=[3, 4], bos_token_id=5, pad_token_id=6, **sampling)
    assert read_side_files(folder, VOCAB_SIZE).generation == Generation((3, 4), 5, 6, Sampling(**sampling))
    _set(folder / "special_tokens_map.json", eos_token={"content": EOS, "lstrip": False})
    _set(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "a"}])
    (folder / "chat_template.jinja").write_text("b", encoding="utf-8")
    side = read_side_files(folder, VOCAB_SIZE)
    assert side.eos_token == {"tokenizer_config.json": EOS, "special_tokens_map.json": EOS}
    assert side.templates == ("a", "b")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eos_token_id", "764", "eos_token_id is '764', expected a token id"),
        ("eos_token_id", 99999, "eos_token_id holds 99999, expected ids below the config's vocab_size 1024"),
        ("eos_token_id", -1, "eos_token_id holds -1"),
        ("eos_token_id", [1, None], "eos_token_id is [1, None]"),
        ("eos_token_id", True, "eos_token_id is True"),
        ("bos_token_id", 1024, "bos_token_id holds 1024"),
        ("pad_token_id", 1.5, "pad_token_id is 1.5"),
        ("temperature", "0.6", "temperature is '0.6', expected a number of at least 0"),
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", 10**400, "temperature is 1000"),
        ("top_p", 1.5, "top_p is 1.5, expected a number of at least 0 and at most 1"),
        ("top_k", 2.5, "top_k is 2.5, expected a whole number"),
        ("top_k", 1 << 40, "top_k is 1099511627776"),
        ("do_sample", "yes", "do_sample is 'yes', expected true or false"),
        ("repetition_penalty", 0, "repetition_penalty is 0, expected a number above 0"),
        ("no_repeat_ngram_size", [], "no_repeat_ngram_size is []"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(folder: Path, key: str, value: object, said: str) -> None:
    _set(folder / "generation_config.json", **{key: value})
    with pytest.raises(CheckpointError) as found:
        read_side_files(folder, VOCAB_SIZE)
    message = str(found.value)
    assert "generation_config.json" in message and said in message and len(message) < 300 and "\n" not in message


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.mark.parametrize("file", [*FILES, "chat_template.jinja", "model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tiny_r1: Path, folder: Path, file: str) -> None:
    shutil.copy(tiny_r1 / "model.safetensors", folder)
    (folder / file).write_text(LFS, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{file} is a git-lfs pointer.*git lfs pull"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b"[]", "expected an object"),
        (b'{"a": ', "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_file_that_is_none_is_one_line(tiny_r1: Path, folder: Path, file: str, content: bytes, said: str) -> None:
    shutil.copy(tiny_r1 / "model.safetensors", folder)
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(folder)
    assert file in str(found.value) and said in str(found.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_side_files(folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "BPE"}}, "holds no vocabulary"),
        ({"model": {"vocab": {"a": "b"}}}, "holds no vocabulary"),
        ({"model": {"vocab": [["a", -1.0], ["b"]]}}, "holds no vocabulary"),
        ({"added_tokens": [{"content": "a"}]}, "added_tokens holds an entry without content and id"),
        ({"added_tokens": {"a": 1}}, "added_tokens holds"),
    ],
)
def test_a_tokenizer_without_tokens_is_one_line(folder: Path, change: dict[str, Any], said: str) -> None:
    _set(folder / "tokenizer.json", **change)
    with pytest.raises(CheckpointError, match=said):
        read_side_files(folder, VOCAB_SIZE)


def test_a_unigram_vocabulary_is_read(folder: Path) -> None:
    _set(
        folder / "tokenizer.json", model={"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, added_tokens=None
    )
    vocabulary = read_side_files(folder, VOCAB_SIZE).vocabulary
    assert vocabulary is not None and vocabulary.id_of("a") == 1 and vocabulary.ids == {0, 1}


def _side(generation: tuple[int, ...] = (), eos: str = "", templates: tuple[str, ...] = ()) -> SideFiles:
    added = {EOS: 7, "<|im_end|>": 8, "<|eot_id|>": 9, "<|end|>": 10}
    vocabulary = Vocabulary(added, {"a": 0}, frozenset([0, *added.values()]))
    named = {"tokenizer_config.json": eos} if eos else {}
    return SideFiles(Generation(generation), vocabulary, named, templates)


@pytest.mark.parametrize(
    ("side", "config_ids", "expected"),
    [
        (_side((7,)), (), {7: ("generation_config.json",)}),
        (_side(), (7,), {7: ("config.json",)}),
        (_side(eos=EOS), (), {7: ("tokenizer_config.json (eos_token)",)}),
        # A fine-tune that kept its base model's generation_config.json.
        (
            _side((3,), EOS),
            (3,),
            {3: ("generation_config.json", "config.json"), 7: ("tokenizer_config.json (eos_token)",)},
        ),
        # A turn's end that the template alone knows.
        (
            _side((3,), templates=("{{ x }}<|im_end|>",)),
            (),
            {3: ("generation_config.json",), 8: ("the chat template",)},
        ),
        # The vocabulary has it, the template does not use it.
        (_side((3,), templates=("{{ x }}",)), (), {3: ("generation_config.json",)}),
    ],
)
def test_stops_are_the_union_of_what_is_said(
    side: SideFiles, config_ids: tuple[int, ...], expected: dict[int, tuple[str, ...]]
) -> None:
    found = stop_tokens(side, config_ids, VOCAB_SIZE)
    assert {token.id: token.sources for token in found} == expected
    assert list(expected) == [token.id for token in found]
    assert {token.id: token.token for token in found if token.id in (7, 8)}.items() <= {7: EOS, 8: "<|im_end|>"}.items()


def test_an_end_of_message_does_not_end_an_answer() -> None:
    """gpt-oss ends each message of an answer with <|end|>, and the answer with <|return|>."""
    added = {"<|end|>": 5, "<|return|>": 6}
    side = SideFiles(vocabulary=Vocabulary(added, {}, frozenset(added.values())), templates=("<|end|><|return|>",))
    assert [token.id for token in stop_tokens(side, (), VOCAB_SIZE)] == [6]


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("<|im_end|>\n", [3, 8]),
        ("\n<|end|>", [3, 10]),
        (f"{EOS}<|User|>", [3, 7]),
        ("", [3]),
        ("\n<|unheard of|>", [3]),
    ],
)
def test_what_a_template_writes_behind_an_answer_ends_it(written: str, ids: list[int]) -> None:
    """However the template spells it: as text, joined from parts, or by a variable."""
    assert [token.id for token in stop_tokens(_side((3,)), (), VOCAB_SIZE, written)] == ids


def test_no_end_at_all_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no file of the checkpoint says where an answer ends"):
        stop_tokens(_side(), (), VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=r"config.json ends answers with token 5000"):
        stop_tokens(_side(), (5000,), VOCAB_SIZE)


@pytest.mark.parametrize("key", ["top_k", "no_repeat_ngram_size", "min_length"])
def test_a_whole_number_may_be_written_as_a_float(folder: Path, key: str) -> None:
    _set(folder / "generation_config.json", **{key: 5.0})
    value = getattr(read_side_files(folder, VOCAB_SIZE).generation.sampling, key)
    assert value == 5 and isinstance(value, int)
    _set(folder / "generation_config.json", **{key: 5.5})
    with pytest.raises(CheckpointError, match=rf"{key} is 5\.5, expected a whole number"):
        read_side_files(folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("tokenizer_config.json", "bos_token", 3, "bos_token is 3, expected a token's text"),
        ("special_tokens_map.json", "pad_token", ["a"], "pad_token is ['a'], expected a token's text"),
        ("tokenizer_config.json", "tokenizer_class", 3, "tokenizer_class is 3, expected a text"),
        ("tokenizer_config.json", "add_bos_token", "yes", "add_bos_token is 'yes', expected true or false"),
        ("chat_template.json", "chat_template", 3, "chat_template is 3, expected a text"),
        ("tokenizer_config.json", "chat_template", {"default": 3}, "chat_template is {'default': 3}, expected a text"),
        ("tokenizer_config.json", "additional_special_tokens", 5, "additional_special_tokens is 5, expected a list"),
        ("special_tokens_map.json", "extra_special_tokens", "x", "extra_special_tokens is 'x', expected a list"),
        ("tokenizer_config.json", "added_tokens_decoder", [], "added_tokens_decoder is [], expected an object"),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "a"}}, "added_tokens_decoder has 'x'"),
        ("tokenizer_config.json", "added_tokens_decoder", {"5": 3}, "added_tokens_decoder has '5': 3"),
        ("tokenizer_config.json", "model_max_length", float("nan"), "model_max_length is nan"),
        ("added_tokens.json", "<x>", "7", "holds an entry that is no token with an id"),
        ("config.json", "architectures", ["Qwen2ForSequenceClassification"], "a model that writes no text"),
        ("config.json", "rope_scaling", {"factor": 2.0}, "have the factor 2.0 and no rope_type"),
        ("config.json", "bos_token_id", 1024, "bos_token_id is 1024, expected an id below vocab_size 1024"),
        ("config.json", "pad_token_id", 99999, "pad_token_id is 99999, expected an id below vocab_size 1024"),
    ],
)
def test_a_setting_of_another_type_or_range_is_one_line(
    tiny_r1: Path, folder: Path, file: str, key: str, value: object, said: str
) -> None:
    shutil.copy(tiny_r1 / "model.safetensors", folder)
    _set(folder / file, **{key: value})
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        open_checkpoint(folder)
    assert said in str(caught.value) and file in str(caught.value) and "\n" not in str(caught.value)
