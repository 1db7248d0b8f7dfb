"""Whether onnxruntime-genai's tokenizer encodes texts as `tokenizers` does, and which settings make it so.

Runs in a process of its own: native code reads what somebody else wrote. No weights are read for it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.tokenizer_rewrite import with_known_splits, with_tokens
from toolkit.checkpoint.side_files import TOKENIZER_CONFIG_FILE
from toolkit.errors import MachineError, UnsupportedError
from toolkit.evaluate.renders import NOT_TRIED, STUB_SETTINGS, open_tokenizer
from toolkit.files import write_json

_SECONDS: Final = 300
# Classes that onnxruntime-genai knows, for a tokenizer.json of a class that it does not.
_KNOWN_CLASSES: Final = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GemmaTokenizerFast")
# What settings have to say, beside special tokens.
_PLAIN_SETTINGS: Final = ("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space")
_TEXTS: Final = {
    "words": "Hello world, this is a sentence.",
    "contractions": "It's what we'll do, don't you think? I'LL go.",
    "digits": "In 1984 it was 3.14159 or 100000000 of 12,345",
    "code": "def f(x):\n    return x + 1\n\n\tif a == b:\n        pass\n",
    "lines": "a\n\n\nb \n c\r\nd",
    "leading spaces": "  two before, two after  ",
    "Chinese, Japanese, Korean": "你好，世界！日本語のテキスト。안녕하세요",
    "emoji": "🙂👩‍👩‍👧✨ ok",
    "accents": "naïve café ÀÉÎ ΑΒΓ привет",
    "markers": "<think>\nso\n</think>\n\n4",
    "letters apart from their accents": "e\u0301 a\u0300",
    "signs of one width": "ﬁ Å ① \u3000 \u00a0x",
    "white space alone": " \n \t ",
    "a long word": "A" * 70,
}
# What few prompts hold, or a normalizer alone treats; the rest is what every prompt has.
_RARE: Final = ("letters apart from their accents", "signs of one width", "white space alone", "a long word")
_TEMPLATE: Final = "{{ messages[0].content }}"
# How many of the everyday texts may come out otherwise, plain words never, before prompts are wrong altogether.
_MOST_DIFFERENT: Final = 4


@dataclass(frozen=True)
class CheckedTokenizer:
    """tokenizer_config.json as onnxruntime-genai gets it, without a chat template. `changes` say what is otherwise in
    it than in the original, `differs` names the kinds of text that are encoded otherwise even so, `splits` what is
    written otherwise in tokenizer.json, whose splits are then those of `with_known_splits`."""

    config: Mapping[str, Any]
    changes: tuple[str, ...]
    differs: tuple[str, ...]
    splits: tuple[str, ...] = ()


def checked_tokenizer(
    tokenizer_file: Path, config: Mapping[str, Any], added: Mapping[str, int] | None = None
) -> CheckedTokenizer:
    """The settings, changed where onnxruntime-genai would not read them or encode texts otherwise than `tokenizers`.
    `added` are tokens, with their ids, that tokenizer.json lacks.

    Raises UnsupportedError where no settings make it open the tokenizer, or most texts are encoded otherwise.
    """
    stat = tokenizer_file.stat()
    try:
        job = json.dumps({"config": dict(config), "added": dict(added or {})})
        made = _checked_apart(str(tokenizer_file.resolve()), (stat.st_size, stat.st_mtime_ns), job)
    except ChildFailed as failure:
        raise UnsupportedError(f"onnxruntime-genai cannot use {tokenizer_file}: {failure.reason}") from None
    if made["problem"]:
        raise UnsupportedError(f"onnxruntime-genai cannot use {tokenizer_file}: {made['problem']}")
    differs = tuple(made["differs"])
    everyday = [name for name in differs if name in _TEXTS and name not in _RARE]
    if "words" in everyday or len(everyday) > _MOST_DIFFERENT:
        raise UnsupportedError(
            f"onnxruntime-genai encodes {', '.join(everyday)} otherwise than {tokenizer_file} says: it does not know "
            "this kind of tokenizer"
        )
    return CheckedTokenizer(made["config"], tuple(made["changes"]), differs, tuple(made["splits"]))


@lru_cache(maxsize=32)  # bundles made in one process are mostly of one checkpoint
def _checked_apart(tokenizer_file: str, version: tuple[int, int], job: str) -> Any:
    """What the child answers; `version` tells files of one name apart."""
    return run_apart("toolkit.evaluate.encodes", {"tokenizer": tokenizer_file, **json.loads(job)}, timeout_s=_SECONDS)


def _checked(job: Mapping[str, Any]) -> object:
    """In the child: the settings that come nearest, and the splits; the given ones before others that are as near."""
    with tempfile.TemporaryDirectory() as folder:
        written = _ways_to_write(Path(job["tokenizer"]), job.get("added", {}), Path(folder))
        texts, wanted = _probes(written[0][0])
        problem, found = "", []
        for path, splits in written:
            if splits and _by_tokenizers(path, texts) != wanted:
                continue
            for changes, config in _candidates(job["config"]):
                try:
                    encoded = _encoded(path, config, texts)
                except MachineError as lacking:
                    not_tried = [f"{NOT_TRIED}{lacking}"]
                    return {"problem": "", "config": job["config"], "changes": [], "differs": not_tried, "splits": []}
                except Exception as failure:  # whatever the runtime throws
                    problem = problem or " ".join(str(failure).split())[:200]
                    continue
                differs = [name for name, ids in wanted.items() if encoded[name] != ids]
                found.append({"config": config, "changes": changes, "differs": differs, "splits": splits})
                if not differs:
                    return {"problem": "", **found[-1]}
    if not found:
        nothing: dict[str, object] = {"config": {}, "changes": [], "differs": [], "splits": []}
        return {"problem": problem or "it does not open", **nothing}
    return {"problem": "", **min(found, key=lambda entry: len(entry["differs"]))}


def _ways_to_write(path: Path, added: Mapping[str, int], folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """tokenizer.json as it is to be read, and in other words that should mean the same, each with what is otherwise."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    first = path
    if added:
        raw, first = with_tokens(raw, added), folder / "with_tokens.json"
        write_json(first, raw)
    known, splits = with_known_splits(raw)
    if not splits:
        return [(first, ())]
    write_json(folder / "with_known_splits.json", known)
    return [(first, ()), (folder / "with_known_splits.json", splits)]


def encoded_otherwise(tokenizer: Any, tokenizer_file: Path) -> list[str]:
    """The texts, by name, that an open tokenizer of onnxruntime-genai encodes otherwise than `tokenizers` does by this
    file."""
    texts, wanted = _probes(tokenizer_file)
    return [name for name, ids in wanted.items() if _ids(tokenizer, texts[name]) != ids]


def _probes(tokenizer_file: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Texts by name, the added tokens' among them, and the ids that `tokenizers` makes of each."""
    from tokenizers import Tokenizer

    right = Tokenizer.from_file(str(tokenizer_file))
    added = {token.content: token for token in right.get_added_tokens_decoder().values()}
    texts = _TEXTS | {f"added token {text}": f"a {text} b{text}c  {text}\n d" for text in sorted(added)[:64]}
    return texts, _by_tokenizers(tokenizer_file, texts)


def _by_tokenizers(tokenizer_file: Path, texts: Mapping[str, str]) -> dict[str, list[int]]:
    from tokenizers import Tokenizer

    right = Tokenizer.from_file(str(tokenizer_file))
    return {name: right.encode(text, add_special_tokens=False).ids for name, text in texts.items()}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(number) for number in tokenizer.encode(text)]


def _candidates(given: Mapping[str, Any]) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """Yields settings to try, each with what is changed in them, in words."""
    yield [], given
    whole = {key: value for key, value in given.items() if value is not None}
    dropped = ["null is taken for absent"] if len(whole) < len(given) else []
    if dropped:
        yield dropped, whole
    plain = {key: value for key, value in whole.items() if key in _PLAIN_SETTINGS or key.endswith("_token")}
    if len(plain) < len(whole):
        others = ", ".join(sorted(set(whole) - set(plain)))[:200]
        yield [*dropped, f"left out, for something in it is not read: {others}"], plain
    kept = {**whole, "add_bos_token": False, "add_eos_token": False}
    for flag in ("add_bos_token", "add_eos_token"):
        if whole.get(flag):
            yield [*dropped, "no tokens are added that the chat template does not write"], kept
            break
    for known in _KNOWN_CLASSES:
        name = given.get("tokenizer_class")
        if known != name:
            yield [*dropped, f"tokenizer_class is {known} instead of {name}"], {**whole, "tokenizer_class": known}


def _encoded(tokenizer_file: Path, config: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(tokenizer_file, Path(folder) / names.TOKENIZER_FILE)
        write_json(Path(folder) / names.GENAI_CONFIG_FILE, STUB_SETTINGS)
        write_json(Path(folder) / TOKENIZER_CONFIG_FILE, {**config, "chat_template": _TEMPLATE})
        tokenizer = open_tokenizer(folder)
        # Tokenizers of some classes open and have no template.
        tokenizer.apply_chat_template('[{"role": "user", "content": "a"}]', add_generation_prompt=True)
        return {name: _ids(tokenizer, text) for name, text in texts.items()}


if __name__ == "__main__":
    answer(_checked)
