"""Whether onnxruntime-genai renders a checkpoint's chat template as it is meant, and what makes it so.

Runs in a process of its own, with bounds on time and memory: a template is a program that somebody else wrote. The
measure is jinja2, as transformers sets it up.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.template_jinja import compile_template, render
from toolkit.bundle.template_probes import FINISHED, PROBES, Message, Probe
from toolkit.bundle.template_rewrite import rewrite
from toolkit.checkpoint.side_files import TOKENIZER_CONFIG_FILE
from toolkit.errors import MachineError, UnsupportedError
from toolkit.evaluate.thought import opens_thought
from toolkit.files import write_json
from toolkit.typed_json import from_json, to_json

NOT_TRIED: Final = "not tried: "
# By the wall, on machines with much else to do: each takes a second.
_SECONDS: Final = 300
_MEMORY_BYTES: Final = 6 << 30
# What the engine knows of by itself.
KNOWN_TOKENS: Final = ("bos_token", "eos_token")
# A tokenizer that costs nothing to read, where a template alone is tried.
_STUB_TOKENIZER: Final = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}
STUB_SETTINGS: Final = {
    "model": {
        "type": "llama",
        "vocab_size": 2,
        "context_length": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "decoder": {"filename": "none.onnx"},
    },
    "search": {"max_length": 8},
}


@dataclass(frozen=True)
class TemplateJob:
    """A chat template, and the special tokens that it is rendered with: those with a name, and the list of others."""

    text: str
    special_tokens: dict[str, str]
    additional_special_tokens: tuple[str, ...] = ()

    def variables(self) -> dict[str, str | list[str]]:
        """The special tokens as a template finds them; transformers leaves an empty list out."""
        others = [*self.additional_special_tokens]
        return {**self.special_tokens, **({"additional_special_tokens": others} if others else {})}


@dataclass(frozen=True)
class CheckedTemplate:
    """A template as onnxruntime-genai gets it. `changes` say what is written in another way than in the original,
    `differs` names the conversations that still come out otherwise; `opens_thought` is whether a prompt ends in one,
    `after_answer` what the original writes behind an answer that is the last of a conversation."""

    text: str
    changes: tuple[str, ...]
    differs: tuple[str, ...]
    opens_thought: bool
    after_answer: str = ""


def checked_template(job: TemplateJob) -> CheckedTemplate:
    """The job's template, rewritten where onnxruntime-genai would render it otherwise than jinja2.

    Raises UnsupportedError for one that jinja2 cannot render, that does not end, or for which no equivalent is found.
    """
    return _checked_apart(json.dumps(to_json(job)))


@lru_cache(maxsize=32)  # bundles made in one process are mostly of one checkpoint
def _checked_apart(job: str) -> CheckedTemplate:
    try:
        made = run_apart("toolkit.evaluate.renders", json.loads(job), timeout_s=_SECONDS)
    except ChildFailed as failure:
        raise UnsupportedError(f"the chat template cannot be used: {failure.reason}") from None
    if "error" in made:
        raise UnsupportedError(made["error"])
    return from_json(CheckedTemplate, made, "the checked template")


def _checked(raw: Mapping[str, Any]) -> object:
    """In the child: the first of the original, its rewriting and its exact rewriting that renders as jinja2 does."""
    job = from_json(TemplateJob, raw, "the job")
    _bound_memory()
    try:
        return to_json(best_template(job))
    except MachineError as problem:
        return to_json(_untried(job, str(problem)))
    except UnsupportedError as problem:
        return {"error": str(problem)}


def _untried(job: TemplateJob, reason: str) -> CheckedTemplate:
    """The rewritten template where there is no onnxruntime-genai to try it in, or the original if there is none."""
    wanted = _wanted(job)
    plain = next((max(right) for probe, right in wanted if probe is PROBES[0]), "")
    text, changes = next(((text, why) for text, why in _candidates(job) if not isinstance(why, str)), (job.text, ()))
    return CheckedTemplate(text, changes, (f"{NOT_TRIED}{reason}",), opens_thought(plain), _after_answer(wanted))


def best_template(job: TemplateJob) -> CheckedTemplate:
    """As `checked_template`, in this process and without bounds."""
    wanted = _wanted(job)
    if not wanted:
        raise UnsupportedError("the chat template renders no conversation in jinja2: put another beside it")
    asked = str(PROBES[0].messages[0]["content"]).casefold()
    if not any(asked in text.casefold() for _, right in wanted for text in right) and not _asks_in_parts(job, asked):
        raise UnsupportedError("the chat template leaves out what is asked, whatever it is: put another beside it")
    tried: list[CheckedTemplate] = []
    problem = ""
    for text, changes in _candidates(job):
        if isinstance(changes, str):
            problem = changes
            continue
        tried.append(_tried(text, changes, job, wanted))
        if not tried[-1].differs:
            return tried[-1]
    best = min(tried, key=lambda found: len(found.differs))
    with_tools = {probe.name for probe in PROBES if probe.tools}
    if set(best.differs) - with_tools:
        why = problem or f"{best.differs[0]} comes out otherwise than in jinja2"
        raise UnsupportedError(f"the chat template does not work in onnxruntime-genai ({why}): put another beside it")
    return best


def as_it_stands(job: TemplateJob) -> CheckedTemplate:
    """The template without a change, and what of it comes out otherwise."""
    return _tried(job.text, (), job, _wanted(job))


def rendered_otherwise(tokenizer: Any, job: TemplateJob) -> list[str]:
    """The conversations, by name, that an open tokenizer renders otherwise than jinja2 renders the job's template."""
    return [probe.name for probe, right in _wanted(job) if _one(tokenizer, probe) not in right]


def _tried(
    text: str, changes: tuple[str, ...], job: TemplateJob, wanted: list[tuple[Probe, set[str]]]
) -> CheckedTemplate:
    rendered = _rendered(text, job, [probe for probe, _ in wanted])
    differs = tuple(p.name for (p, right), made in zip(wanted, rendered, strict=True) if made not in right)
    plain = next((made for (p, _), made in zip(wanted, rendered, strict=True) if p is PROBES[0]), None)
    return CheckedTemplate(text, changes, differs, opens_thought(plain or ""), _after_answer(wanted))


def _after_answer(wanted: list[tuple[Probe, set[str]]]) -> str:
    """What jinja2 writes behind the last answer of a finished conversation; nothing where the template takes none."""
    for probe, right in wanted:
        if probe is FINISHED:
            before, answer, after = max(right).rpartition(str(probe.messages[-1]["content"]))
            return after if before + answer else ""
    return ""


def _candidates(job: TemplateJob) -> Iterator[tuple[str, tuple[str, ...] | str]]:
    """Texts to try with their changes, or with the reason why there is none. The original is one of them where nothing
    in it calls for a change, and at the end, if all else fails."""
    unknown = {name: given for name, given in job.variables().items() if name not in KNOWN_TOKENS}
    for exact in (False, True):
        try:
            made = rewrite(job.text, unknown, exact)
        except UnsupportedError as problem:
            yield job.text, str(problem)
            break
        if not made.changes:
            yield job.text, ()
        yield made.text, made.changes
    yield job.text, ()


def _asks_in_parts(job: TemplateJob, asked: str) -> bool:
    """Whether a template has what is asked where a message is a list of parts, as those of models that see have it."""
    messages: list[Message] = [{"role": "user", "content": [{"type": "text", "text": asked}]}]
    with suppress(Exception):  # whatever a template raises
        return asked in render(compile_template(job.text), messages, job.variables()).casefold()
    return False


def _wanted(job: TemplateJob) -> list[tuple[Probe, set[str]]]:
    """What jinja2 renders, for each conversation that the template takes. A message without text may come out as
    nothing where jinja2 writes None."""
    try:
        template = compile_template(job.text)
    except Exception as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UnsupportedError(f"the chat template is none that jinja2 can read: {reason}") from None
    found = []
    for probe in PROBES:
        right = set()
        filled: list[Message] = [{**message, "content": message["content"] or ""} for message in probe.messages]
        for messages in ([*probe.messages], filled):
            with suppress(Exception):  # whatever a template raises
                tools = list(probe.tools) or None
                right.add(render(template, messages, job.variables(), tools, probe.add_generation_prompt))
            if not right:
                break
        if right:
            found.append((probe, right))
    return found


def _rendered(text: str, job: TemplateJob, probes: list[Probe]) -> list[str | None]:
    """What onnxruntime-genai renders of each conversation; None where it fails."""
    known = {name: token for name, token in job.special_tokens.items() if name in KNOWN_TOKENS}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **known, "chat_template": text}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (
            (names.TOKENIZER_FILE, _STUB_TOKENIZER),
            (names.GENAI_CONFIG_FILE, STUB_SETTINGS),
            (TOKENIZER_CONFIG_FILE, config),
        ):
            write_json(Path(folder) / name, value)
        tokenizer = open_tokenizer(folder)
    return [_one(tokenizer, probe) for probe in probes]


def open_tokenizer(folder: str) -> Any:
    """onnxruntime-genai's tokenizer of a folder, without its weights. Raises MachineError if genai is not here."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise MachineError("onnxruntime-genai is not installed: pip install onnxruntime-genai") from None
    try:
        return og.Tokenizer(folder)
    except TypeError:
        raise MachineError("this onnxruntime-genai reads no tokenizer by itself: install 0.18 or later") from None


def _one(tokenizer: Any, probe: Probe) -> str | None:
    tools = {"tools": json.dumps(probe.tools, ensure_ascii=False)} if probe.tools else {}
    text = json.dumps(probe.messages, ensure_ascii=False)
    try:
        return str(tokenizer.apply_chat_template(text, add_generation_prompt=probe.add_generation_prompt, **tools))
    except Exception:  # whatever the runtime throws
        return None


def _bound_memory() -> None:
    """A template that asks for more memory than any needs is told that there is none, where the system can do that."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    answer(_checked)
