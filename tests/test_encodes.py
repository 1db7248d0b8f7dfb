"""Tokenizers: which settings make onnxruntime-genai encode as `tokenizers` does, what is named, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from toolkit.bundle.reasoning import Marker, reasoning
from toolkit.bundle.tokenizer_rewrite import _alternatives, with_known_splits
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.side_files import Sampling
from toolkit.errors import CheckpointError, MachineError, UnsupportedError
from toolkit.evaluate import encodes
from toolkit.evaluate.encodes import checked_tokenizer
from toolkit.pipeline.tokenizer import plan_tokenizer, write_tokenizer

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
TEXT = ["Hello world, it's 1984.", "你好 naïve café\n", "def f(x): return x"] * 4


def tokenizer(folder: Path, regex: str = WORDS, normalizer: normalizers.Normalizer | None = None) -> Path:
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.add_special_tokens([AddedToken("<|left|>", lstrip=True, normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("key", "value"), [("model_max_length", "8192"), ("legacy", "yes"), ("clean_up_tokenization_spaces", "no")]
)
def test_a_setting_that_genai_stumbles_over_is_left_out(tmp_path: Path, key: str, value: object) -> None:
    made = checked_tokenizer(tokenizer(tmp_path), {**KNOWN, key: value})
    assert made.config == KNOWN or key not in made.config or made.changes == ()
    assert made.differs == ("added token <|left|>",)


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def test_splits_that_genai_does_not_know_are_written_in_those_that_it_does(tmp_path: Path) -> None:
    """OLMo 2's, and others' that are tiktoken's cl100k_base."""
    path = tokenizer(tmp_path, CL100K)
    made = checked_tokenizer(path, KNOWN)
    assert made.splits and made.differs == ("added token <|left|>",) and made.config == KNOWN
    raw = json.loads(path.read_text(encoding="utf-8"))
    written, _ = with_known_splits(raw)
    right, other = Tokenizer.from_file(str(path)), Tokenizer.from_str(json.dumps(written))
    assert written != raw
    awkward = [
        "I'LL we'd 'tis ''s",
        "a\r\n\r\n b \n\t\nc  ",
        "1234567 ½ Ⅷ ٣٤٥",
        "!!?\n\n'",
        "_x__y-\n z",
        "\u3000字 é\u0301 ",
    ]
    for text in [*awkward, *TEXT, "".join(awkward) * 3]:
        assert right.encode(text).ids == other.encode(text).ids, text


def test_an_expression_is_taken_apart_at_its_own_bars_alone() -> None:
    assert _alternatives(r"a|(b|c)|[|(]|\||d(e[)|]|f)") == ["a", "(b|c)", "[|(]", r"\|", "d(e[)|]|f)"]


@pytest.mark.parametrize("given", [None, [], "x", {"type": "Sequence"}, {"type": "Sequence", "pretokenizers": [1]}])
def test_a_tokenizer_without_splits_stays(given: object) -> None:
    assert with_known_splits({"pre_tokenizer": given}) == ({"pre_tokenizer": given}, ())


def test_settings_that_are_right_stay(tmp_path: Path) -> None:
    made = checked_tokenizer(tokenizer(tmp_path), KNOWN)
    assert (made.config, made.changes) == (KNOWN, ())
    assert made.differs == ("added token <|left|>",)  # genai keeps the blank before it


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({**KNOWN, "tokenizer_class": "MyTokenizer"}, "PreTrainedTokenizerFast instead of MyTokenizer"),
        ({**KNOWN, "tokenizer_class": None}, "null is taken for absent"),
        ({**KNOWN, "model_max_length": None}, "null is taken for absent"),
    ],
)
def test_settings_that_genai_does_not_read_are_changed(tmp_path: Path, config: dict[str, object], change: str) -> None:
    made = checked_tokenizer(tokenizer(tmp_path), config)
    assert change in " ".join(made.changes)
    assert made.differs == ("added token <|left|>",)


def test_what_a_normalizer_alone_changes_is_named(tmp_path: Path) -> None:
    made = checked_tokenizer(tokenizer(tmp_path, normalizer=normalizers.NFC()), KNOWN)
    assert made.differs == ("letters apart from their accents", "added token <|left|>")


@pytest.mark.parametrize("regex", [r"'(?i:[sdmt])|[^\r\n\p{L}]?+\p{L}+|\s+(?!\S)|\s+"])
def test_a_tokenizer_that_genai_does_not_open_is_refused_in_a_line(tmp_path: Path, regex: str) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot use .*tokenizer\.json: ") as caught:
        checked_tokenizer(tokenizer(tmp_path, regex), KNOWN)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_whose_everyday_texts_come_out_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"encodes words, .* otherwise"):
        checked_tokenizer(tokenizer(tmp_path, normalizer=normalizers.Replace(" ", "_")), KNOWN)


def test_a_class_whose_tokenizers_have_no_template_is_refused(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="chat template"):
        checked_tokenizer(tmp_path / "tokenizer.json", {**KNOWN, "tokenizer_class": "T5Tokenizer"})


def test_without_a_genai_the_settings_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: str) -> None:
        raise MachineError("onnxruntime-genai is not installed")

    monkeypatch.setattr(encodes, "open_tokenizer", missing)
    made = encodes._checked({"tokenizer": str(tokenizer(tmp_path)), "config": KNOWN})
    assert isinstance(made, dict)
    assert (made["config"], made["differs"]) == (KNOWN, ["not tried: onnxruntime-genai is not installed"])


def folder_of(tiny_r1: Path, tmp_path: Path) -> Checkpoint:
    for path in tiny_r1.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return open_checkpoint(tmp_path)


def test_a_checkpoint_that_is_right_is_copied(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    checkpoint = folder_of(tiny_r1, tmp_path)
    planned = plan_tokenizer(checkpoint)
    assert (planned.config, planned.changed, planned.opens_thought) == (None, (), True)
    names = write_tokenizer(planned, checkpoint, (), tmp_path / "bundle")
    assert sorted(names) == ["generation_config.json", "reasoning.json", "tokenizer.json", "tokenizer_config.json"]
    said = json.loads((tmp_path / "bundle" / "reasoning.json").read_text(encoding="utf-8"))
    assert said["begin_of_thought"]["text"] == "<think>" and said["prompt_opens_thought"] is True
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    assert said["end_of_thought"] == {"text": "</think>", "id": ids["</think>"]}


def test_a_checkpoint_without_settings_gets_some(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = folder_of(tiny_r1, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    planned = plan_tokenizer(checkpoint)
    assert planned.config is not None
    assert planned.config["eos_token"] == "<｜end▁of▁sentence｜>"
    assert planned.changed[0].why == ("the checkpoint has no tokenizer_config.json",)


def test_a_template_in_a_file_of_its_own_goes_where_every_release_reads_it(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = folder_of(tiny_r1, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if true %}\n{{ messages[0].content }}{% endif %}", encoding="utf-8"
    )
    planned = plan_tokenizer(checkpoint)
    assert planned.config is not None
    assert planned.config["chat_template"] == "{% if true %}{{ messages[0].content }}{% endif %}"
    assert "chat_template.jinja" not in planned.copied
    (tmp_path / "bundle").mkdir()
    write_tokenizer(planned, checkpoint, (), tmp_path / "bundle")
    original = (tmp_path / "bundle" / "chat_template.original.jinja").read_text(encoding="utf-8")
    assert original == planned.template


@pytest.mark.parametrize("named", ["eos_token", "bos_token"])
def test_tokens_that_special_tokens_map_names_reach_the_template(tiny_r1: Path, tmp_path: Path, named: str) -> None:
    """onnxruntime-genai does not read that file; null in tokenizer_config.json is as if it said nothing."""
    checkpoint = folder_of(tiny_r1, tmp_path)
    given = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({named: {"content": given[named]}}), encoding="utf-8")
    assert plan_tokenizer(checkpoint).config is None  # it says what both say
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**given, named: None}), encoding="utf-8")
    planned = plan_tokenizer(open_checkpoint(tmp_path))
    assert planned.config is not None and planned.config[named] == given[named]
    assert f"{named} is that of special_tokens_map.json" in planned.changed[0].why


def test_tokens_of_other_files_are_written_into_tokenizer_json(tiny_r1: Path, tmp_path: Path) -> None:
    folder_of(tiny_r1, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 770}), encoding="utf-8")
    checkpoint = open_checkpoint(tmp_path)
    planned = plan_tokenizer(checkpoint)
    assert planned.words is not None and planned.words.encoded_otherwise == () and "tokenizer.json" in planned.copied
    (tmp_path / "bundle").mkdir()
    assert len(set(names := write_tokenizer(planned, checkpoint, (), tmp_path / "bundle"))) == len(names)
    made = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert made.encode("a<|im_end|>").ids[-1] == 770
    assert planned.changed[0].name == "tokenizer.json" and "<|im_end|>" in planned.changed[0].why[0]


def test_what_stands_behind_an_answer_is_known(tiny_r1: Path, tmp_path: Path) -> None:
    assert plan_tokenizer(folder_of(tiny_r1, tmp_path)).after_answer == "<｜end▁of▁sentence｜>"


def test_a_sentencepiece_model_alone_is_refused_with_a_way_out(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = folder_of(tiny_r1, tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        plan_tokenizer(checkpoint)


def test_a_model_that_does_not_think_has_no_markers(tiny_r1: Path) -> None:
    side = replace(open_checkpoint(tiny_r1).side, vocabulary=None)
    said = reasoning(side, "{{ messages }}", False, ())
    assert (said.begin_of_thought, said.end_of_thought, said.prompt_opens_thought) == (None, None, False)
    assert reasoning(side, "</think>", True, ()).end_of_thought == Marker("</think>")
    assert isinstance(said.sampling, Sampling)
