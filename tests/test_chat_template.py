"""Chat templates: what onnxruntime-genai renders otherwise than jinja2 is written so that it does not, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.bundle.chat_template import additional_special_tokens, shipped_template, special_tokens
from toolkit.bundle.template_jinja import compile_template, render
from toolkit.bundle.template_probes import PROBES, Probe
from toolkit.bundle.template_rewrite import rewrite
from toolkit.errors import CheckpointError, MachineError, UnsupportedError
from toolkit.evaluate import renders
from toolkit.evaluate.renders import TemplateJob, best_template, checked_template
from toolkit.evaluate.renders import _rendered as rendered_by_genai

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = Probe(
    "turns",
    (
        {"role": "system", "content": "Brief.\n"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4", "calls": {}},
        {"role": "user", "content": "你好 </think>"},
    ),
)
LOOP = "{% for m in messages %}"


def genai(text: str, probe: Probe = TURNS) -> str | None:
    return rendered_by_genai(text, TemplateJob(text, TOKENS), [probe])[0]


def jinja(text: str, probe: Probe = TURNS) -> str:
    tools = list(probe.tools) or None
    return render(compile_template(text), [*probe.messages], TOKENS, tools, probe.add_generation_prompt)


DIFFERENT = {
    "text in text": LOOP
    + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}",
    "text not in text": LOOP + "{% if '</think>' not in m.content %}{{ m.content }}{% endif %}{% endfor %}",
    "unknown in text": LOOP + "{{ m.role in 'system user' }}{{ '' in m.role }}{% endfor %}",
    "line ends after blocks": "a\n{% if true %}\nb\n{% endif %}\nc\n{# d #}\ne\n\n",
    "blanks before blocks": LOOP + "\n    {% if loop.first %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}",
    "and": "{{ messages and 'yes' }}{{ '' and 'no' }}{{ (messages[0].zz or 'or') }}",
    "set in an iteration": LOOP + "{% if m.role == 'user' %}{% set seen = 1 %}{% endif %}{{ seen }},{% endfor %}",
    "set outside, changed inside": "{% set x = 'a' %}" + LOOP + "{{ x }}{% set x = m.role %}{% endfor %}{{ x }}",
    "target after its loop": LOOP + "{% endfor %}{{ m is defined }}{{ m }}",
    "loops of one name": LOOP + "{% for m in [1, 2] %}{% endfor %}{{ m.role }}{% endfor %}",
    "a variable like a filter": "{% set length = 7 %}{% set map = [1] %}{{ messages|length }}{{ length }}{{ map[0] }}",
    "macros call themselves": "{% macro f(n, w='-') %}{{ n }}{% if n > 0 %}{{ f(n - 1, w=w) }}{% endif %}{{ n }}{{ w }}"
    "{% endmacro %}{{ f(2) }}{{ f(1, w='+') }}{{ n }}",
    "macro parameters stay its own": "{% set a = 1 %}{% macro f(a) %}{{ a }}{% endmacro %}{{ f(2) }}{{ a }}{{ f() }}",
    "first and last": "{{ (messages|first).role }}{{ (messages|last)['role'] }}",
    "upper": LOOP + "{{ m.role|upper }}{{ m.role.upper() }}{{ missing|upper }}{% endfor %}",
    "replace": LOOP + "{{ m.content|replace('2', '3') }}{{ m.content.replace('2', '') }}{% endfor %}",
    "title": LOOP + "{{ m.role|title }}{{ m.role.title() }}{% endfor %}",
    "reverse": "{% for m in messages|reverse %}{{ m.role }}{% endfor %}",
    "split once": LOOP + "{{ m.content.split('2', 1) }}{{ m.content.rsplit('2', 1)[-1] }}{% endfor %}",
    "keys and values": "{{ messages[0].keys()|join(',') }}{{ messages[0].values()|list|join(',') }}",
    "join of a text": "{{ ', '.join(['a', 'b']) }}",
    "selectattr": "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}",
    "selectattr of what is there": "{{ messages|selectattr('content')|list|length }}"
    "{{ messages|selectattr('calls', 'defined')|list|length }}",
    "rejectattr in elif": "{% if false %}{% elif messages|rejectattr('role', 'in', ['user'])|list %}x{% endif %}",
    "map": "{{ messages|map(attribute='role')|map('upper')|join(' ') }}",
    "a slice beyond its list": "{{ messages[:9]|length }}{{ messages[-9:]|length }}",
    "beyond a list": "{{ messages[9] is defined }}{{ messages[1] is defined }}{{ messages[-1] is defined }}",
    "membership as a test": "{{ 'a' is in ['a'] }}",
    "tests": "{{ 3 is odd }}{{ 4 is even }}{{ 'a' is sequence }}{{ 6 is divisibleby(3) }}{{ 1 is eq 1 }}",
    "undefined joins": "{{ 'a' ~ missing ~ messages[0].missing ~ 'b' }}",
    "division": "{{ 7 / 2 }}",
    "no tools": "{% if tools is none %}none{% endif %}{{ tools is defined }}{% if documents is none %}none{% endif %}",
    "another special token": "{{ pad_token }}{{ bos_token }}",
    "block set with a filter": "{% set x | trim %}  a\n {% endset %}[{{ x }}]",
    "filter block": "{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "generation": "{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x }}",
    "raw": "{% raw %}{{ x }} {% if %}{% endraw %}{",
    "escapes": "{{ 'caf\\u00e9\\x41\\n\\'\"' }}",
    "format": "{{ '{}-{}'.format('a', 1) }}{{ '{1}{0}'.format('a', 'b') }}",
    "startswith of several": LOOP + "{{ m.role.startswith(('user', 'sys')) }}{% endfor %}",
    "break and continue": LOOP + "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "nothing to loop over": "{% for x in [] %}a{% else %}{% set y = 1 %}b{% endfor %}{{ y }}",
    "indent": "{{ 'a\\n\\nb'|indent(2) }}",
    "a line end at the end": "a\n\n",
    "a text's first character": "{{ ('ab' ~ 'c')[0] }}",
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_written_so_that_it_does_not(name: str) -> None:
    text = DIFFERENT[name]
    wanted = jinja(text)
    made = rewrite(text, {"pad_token": "<pad>"})
    assert genai(made.text) == wanted
    assert jinja(made.text) == wanted  # what is read by transformers is right too


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A, %j", "%y/%m"])
def test_dates_are_as_python_writes_them(form: str) -> None:
    text = f"{{% set d = strftime_now('{form}') %}}[{{{{ d }}}}]"
    assert genai(rewrite(text, {}).text) == jinja(text)


def test_most_of_these_do_differ() -> None:
    assert sum(genai(text) != jinja(text) for text in DIFFERENT.values()) > 35


EXACT = {
    "an empty dictionary is false": LOOP
    + "{{ 'x' if m.calls else 'y' }}{% if m.calls and true %}z{% endif %}{% endfor %}",
    "none has a name": "{% for m in [{'a': none}] %}{{ m.a }}{{ m.b }}{{ m.b|default('x') }}{% endfor %}",
    "indented JSON": "{{ {'a': [], 'b': {}, 'c': [{'d': []}]}|tojson(indent=2) }}",
}


@pytest.mark.parametrize("name", EXACT)
def test_what_rarely_differs_has_an_exact_form(name: str) -> None:
    text = EXACT[name]
    assert genai(text) != jinja(text)
    assert genai(rewrite(text, {}, exact=True).text) == jinja(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% if", "none of jinja2's"),
        ("{{ messages|groupby('role') }}", "filter groupby"),
        ("{{ messages is callable }}", "is callable"),
        ("{{ messages.content.zfill(3) }}", "method zfill"),
        ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "recursive loop"),
        ("{{ lipsum() }}", "calls lipsum"),
        ("{{ '%d' % 3 }}", "formats text"),
        ("{% include 'other' %}", "Include block"),
        ("{{ messages|tojson(ensure_ascii=true) }}", "ensure_ascii"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("x" * (1 << 20) + "y", "characters, expected at most"),
    ],
)
def test_what_has_no_equivalent_is_refused_in_a_line(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        rewrite(text, {})
    assert "\n" not in str(caught.value)


def test_a_text_that_grows_without_bound_is_refused() -> None:
    text = "messages" + ".rsplit(',', 1)" * 12
    with pytest.raises(UnsupportedError, match="1 MiB"):
        rewrite("{{ " + text + " }}", {})


R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<U>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<A>' + (content or '') + '<E>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
)


def test_an_earlier_thought_is_left_out_once_the_template_is_checked() -> None:
    checked = checked_template(TemplateJob(R1, TOKENS))
    assert checked.differs == () and checked.opens_thought
    assert checked.changes == ("`in` finds text in text",)
    assert all(genai(checked.text, probe) == jinja(R1, probe) for probe in PROBES if "without text" not in probe.name)
    assert "Two and two" in str(genai(R1, PROBES[6])) and "Two and two" not in str(genai(checked.text, PROBES[6]))


def test_a_template_that_is_right_stays_as_it_is() -> None:
    text = LOOP + "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    checked = checked_template(TemplateJob(text, TOKENS))
    assert (checked.text, checked.changes, checked.opens_thought) == (text, (), False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('never') }}", "renders no conversation"),
        ("{{ 'x' * 100000000000 }}", "renders no conversation"),
        ("{{ messages.__class__.__mro__ }}{% if", "jinja2 can read"),
        ("{{ messages[0].content }}{{ messages|groupby('role')|length }}", "filter groupby"),
        ("{% for message in messages %}{{ message.role }}{% endfor %}", "leaves out what is asked"),
    ],
)
def test_a_template_that_cannot_work_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        checked_template(TemplateJob(text, {}))


ALIKE_FOR_ALL = ["Hello", "{{ messages | length }}", "{% for m in messages %}{{ m.role }}{% endfor %}"]


@pytest.mark.parametrize("text", ALIKE_FOR_ALL)
def test_a_template_that_does_not_say_what_is_asked_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="leaves out what is asked"):
        best_template(TemplateJob(text, {}))


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content + '<|im' + '_end|>' }}\n{% endfor %}", "<|im_end|>\n"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
        ("{{ messages[0].content }}{% if messages[1:] %}{{ raise_exception('one') }}{% endif %}", ""),
    ],
)
def test_what_is_written_behind_an_answer(text: str, after: str) -> None:
    assert best_template(TemplateJob(text, {"eos_token": "</s>"})).after_answer == after


def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renders, "_SECONDS", 3)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UnsupportedError, match="no answer within 3 s"):
        checked_template(TemplateJob(loops, {}))


def test_without_a_genai_to_try_it_in_the_template_is_rewritten_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: str) -> None:
        raise MachineError("onnxruntime-genai is not installed")

    monkeypatch.setattr(renders, "open_tokenizer", missing)
    made = renders._checked({"text": R1, "special_tokens": TOKENS})
    assert isinstance(made, dict)
    assert made["differs"] == ["not tried: onnxruntime-genai is not installed"]
    assert made["opens_thought"] and made["changes"] == ["`in` finds text in text"]


def checkpoint(folder: Path, config: dict[str, Any] | None, files: dict[str, str] | None = None) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = checkpoint(tmp_path, {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": None})
    found = shipped_template(folder)
    assert found is not None
    assert (found.text, found.source, found.others) == ("d", "tokenizer_config.json", ("tool_use",))
    checkpoint(tmp_path, None, {"chat_template.jinja": "j", "additional_chat_templates/rag.jinja": "r"})
    found = shipped_template(folder)
    assert found is not None
    assert (found.text, found.source, found.others) == ("j", "chat_template.jinja", ("rag", "tool_use"))
    checkpoint(tmp_path, None, {"special_tokens_map.json": '{"eos_token": "</s>", "bos_token": "<b>"}'})
    assert special_tokens(folder) == {"bos_token": "<b>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        ({"bos_token": "<s>", "additional_special_tokens": ["<a>", {"__type": "AddedToken", "content": "<b>"}]}, {}),
        ({"bos_token": "<s>"}, {"additional_special_tokens": ["<a>", {"content": "<b>"}]}),
        ({"bos_token": "<s>", "pad_token": "<p>"}, {"pad_token": "<q>", "bos_token": {"content": "<z>"}}),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<z>", "pad_token": "<p>"}),
        ({"bos_token": "<s>", "extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": []}, {}),
    ],
)
def test_a_template_gets_the_special_tokens_that_transformers_gives_it(
    tmp_path: Path, config: dict[str, Any], beside: dict[str, Any], tiny_r1: Path
) -> None:
    from transformers import AutoTokenizer

    names = ("bos_token", "pad_token", "image_token", "additional_special_tokens")
    text = ";".join(f"{{{{ {name}|default('none') }}}}" for name in names)
    text += "{% for token in additional_special_tokens or [] %}({{ token }}){% endfor %}{{ messages[0].content }}"
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text, **config}
    folder = checkpoint(tmp_path, said, {"special_tokens_map.json": json.dumps(beside)})
    (folder / "tokenizer.json").write_bytes((tiny_r1 / "tokenizer.json").read_bytes())
    messages = [{"role": "user", "content": "?"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    job = TemplateJob(text, special_tokens(folder), additional_special_tokens(folder))
    assert render(compile_template(text), [*messages], job.variables()) == theirs
    made = renders.best_template(job)
    probe = Probe("one", ({"role": "user", "content": "?"},))
    known = TemplateJob(made.text, job.special_tokens)
    assert made.differs == () and rendered_by_genai(made.text, known, [probe])[0] == theirs


def test_a_processors_template_is_read_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {}, {"chat_template.json": '{"chat_template": "p"}'})
    found = shipped_template(folder)
    assert found is not None and (found.text, found.source) == ("p", "chat_template.json")
    found = shipped_template(checkpoint(tmp_path, {"chat_template": "t"}))
    assert found is not None and found.text == "t"


def test_a_template_of_parts_is_one() -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    found = best_template(TemplateJob(f"{parts}{{% endfor %}}{{% endfor %}}", {}))
    assert found.text


def test_no_template_and_no_default_template(tmp_path: Path) -> None:
    nothing: tuple[object, ...] = (None, "", [])
    for empty in nothing:
        assert shipped_template(checkpoint(tmp_path, {"chat_template": empty})) is None
    checkpoint(tmp_path, {"chat_template": [{"name": "tool_use", "template": "t"}]})
    with pytest.raises(CheckpointError, match="tool_use and none named default"):
        shipped_template(tmp_path)
    checkpoint(tmp_path, {"chat_template": [1]})
    with pytest.raises(CheckpointError, match="expected a text or a list of named ones"):
        shipped_template(tmp_path)
