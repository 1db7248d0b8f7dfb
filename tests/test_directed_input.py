"""Input that has brought down a reader, here or elsewhere: each is accepted, or refused in one line that says why."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.hostile.parsers import PARSERS, Parser
from tests.hostile.sandbox import Sandbox

HUGE: Final = 10**400
LONG: Final = "x" * 70_000
DEEP: Final = "[" * 3000 + "]" * 3000
LFS: Final = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ACCEPTED: Final = ""
NONE_LISTED: Final[list[Any]] = []
NO_KEYS: Final[dict[str, Any]] = {}

# A file, the keys to a place in it, what is put there, and a part of what is said; nothing for what is accepted.
JSON_CASES: Final[tuple[tuple[str, str, Any, str], ...]] = (
    *(
        ("config", key, value, f"{key} is")
        for key in ("hidden_size", "vocab_size", "num_attention_heads")
        for value in (HUGE, -1, 0, 1.5, "32", True, NONE_LISTED, NO_KEYS)
    ),
    *(
        ("config", "rope_theta", value, "rope_theta is")
        for value in (HUGE, -1, 0, float("nan"), float("inf"), "1", NONE_LISTED)
    ),
    *(
        ("config", "rope_scaling.factor", value, "rope factor is")
        for value in (HUGE, 0, float("inf"), None, NONE_LISTED, "x")
    ),
    *(("config", "rms_norm_eps", value, "rms_norm_eps is") for value in (HUGE, -1e-6, "x")),
    *(
        ("config", "model_type", value, "is not supported")
        for value in (None, NONE_LISTED, NO_KEYS, 3, "gpt9", LONG, "../x")
    ),
    *(
        ("config", "rope_scaling.rope_type", value, "is not supported")
        for value in (NONE_LISTED, NO_KEYS, 3, "dynamic")
    ),
    ("config", "rms_norm_eps", None, ACCEPTED),
    ("config", "max_position_embeddings", None, ACCEPTED),
    ("config", "rope_scaling.rope_type", None, "and no rope_type"),
    ("config", "rope_scaling", [], ACCEPTED),
    ("config", "rope_scaling", [1], "rope parameters are"),
    ("config", "rope_scaling", "yarn", "rope parameters are"),
    ("config", "rope_scaling.original_max_position_embeddings", HUGE, "original_max_position_embeddings is"),
    ("config", "rope_scaling.beta_fast", HUGE, "beta_fast is"),
    ("config", "hidden_act", [], "hidden_act"),
    ("config", "torch_dtype", {}, ACCEPTED),
    ("config", "tie_word_embeddings", "yes", "expected true or false"),
    ("config", "num_hidden_layers", 1 << 31, "up to 1000"),
    ("config", "eos_token_id", [HUGE], "ends answers with token"),
    ("config", "eos_token_id", LONG, "eos_token_id"),
    ("config", "bos_token_id", None, ACCEPTED),
    ("config", "quantization_config", {"quant_method": "hqq"}, "already quantized by hqq"),
    ("config", "quantization_config", {"quant_method": "gptq", "bits": HUGE}, "bits is"),
    ("config", "quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": "x"}, "group_size is"),
    ("config", "quantization_config", {"quant_method": "fp8", "weight_block_size": [HUGE]}, "block_size of"),
    ("config", "quantization_config", {"quant_method": "fp8", "weight_block_size": [1 << 80, -1]}, "block_size of"),
    ("config", "quantization_config", {"quant_method": "compressed-tensors", "format": []}, "format of"),
    (
        "config",
        "quantization_config",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": 7, "b": {"weights": []}},
        },
        ACCEPTED,
    ),
    ("config", "quantization_config", {"quant_method": LONG}, "already quantized"),
    ("config", "architectures", "\ud800", "surrogate"),
    *(
        ("generation_config", key, value, f"{key} is")
        for key in ("temperature", "top_p", "repetition_penalty")
        for value in (HUGE, -1, "x", NONE_LISTED, float("nan"))
    ),
    *(("generation_config", "top_k", value, "top_k is") for value in (HUGE, -2, 1.5, "x", NONE_LISTED)),
    *(
        ("generation_config", "eos_token_id", value, "eos_token_id")
        for value in (HUGE, -1, 1.5, "x", [NONE_LISTED], 264)
    ),
    ("generation_config", "eos_token_id", None, ACCEPTED),
    ("generation_config", "eos_token_id", [], ACCEPTED),
    ("generation_config", "do_sample", "true", "expected true or false"),
    ("tokenizer", "model", [], "no vocabulary"),
    ("tokenizer", "model.vocab", {}, "no vocabulary"),
    ("tokenizer", "model.vocab.a", HUGE, "no vocabulary"),
    ("tokenizer", "model.vocab.a", "x", "no vocabulary"),
    ("tokenizer", "model.type", "Odd", "cannot use"),
    ("tokenizer", "model.merges", "x", "cannot use"),
    ("tokenizer", "pre_tokenizer", {"type": "Odd"}, "cannot use"),
    ("tokenizer", "added_tokens", {}, "added_tokens"),
    ("tokenizer", "added_tokens", [None], "added_tokens"),
    ("tokenizer", "added_tokens", [{"id": -1, "content": "x"}], "added_tokens"),
    ("tokenizer", "added_tokens", [{"id": 1 << 40, "content": "x"}], "added_tokens"),
    ("tokenizer", "added_tokens", [{"id": 3, "content": []}], "added_tokens"),
    ("tokenizer_config", "chat_template", 7, "chat_template is"),
    ("tokenizer_config", "chat_template", [7], "chat_template is"),
    ("tokenizer_config", "chat_template", [{"name": [], "template": "x"}], "chat_template"),
    ("tokenizer_config", "chat_template", "{% for", "chat template"),
    ("tokenizer_config", "chat_template", "{{ 1 / 0 }}", "chat template"),
    ("tokenizer_config", "chat_template", "\ud800", "surrogate"),
    ("tokenizer_config", "eos_token", 7, "eos_token is"),
    ("tokenizer_config", "eos_token", {"content": []}, "eos_token is"),
    ("tokenizer_config", "tokenizer_class", None, ACCEPTED),
    ("special_tokens_map", "eos_token", [], "eos_token is"),
    ("special_tokens_map", "bos_token", None, ACCEPTED),
    ("index", "weight_map", [], "weight_map"),
    ("index", "weight_map", {}, "weight_map"),
    ("index", "weight_map.lm_head\\.weight", "../x.safetensors", "plain file name"),
    ("index", "weight_map.lm_head\\.weight", "/etc/passwd", "plain file name"),
    ("index", "weight_map.lm_head\\.weight", 7, "plain file name"),
    ("index", "weight_map.lm_head\\.weight", "gone.safetensors", "missing"),
    ("index", "weight_map.lm_head\\.weight", LONG, "names 'xxx"),
    ("adapter", "lora_alpha", HUGE, "lora_alpha is"),
    ("adapter", "lora_alpha", float("nan"), "lora_alpha is"),
    ("adapter", "peft_type", [], "peft_type is"),
    ("adapter", "alpha_pattern", [], ACCEPTED),
    ("recipe", "quality", [], "quality [] is unknown"),
    ("recipe", "quality", "fastest", "did you mean"),
    ("recipe", "quantize", [], "must be a list of rules"),
    ("recipe", "quantize.0.bits", 8.0, "8.0 bits"),
    ("recipe", "quantize.0.bits", True, "True bits"),
    ("recipe", "quantize.0.block_size", 32.0, "blocks of 32.0"),
    ("recipe", "quantize.0.algorithm", [], "algorithm"),
    ("recipe", "quantize.0.match", None, "match is"),
    ("recipe", "validate.mean_kld", float("inf"), "validate has"),
    ("recipe", "validate.mean_kld", "x", "validate has"),
    ("recipe", "validate", [], "validate is"),
    ("recipe", "tasks", [["x"]], "tasks is"),
    ("recipe", "name", LONG, "usable as a folder name"),
    ("recipe", "name", "../x", "usable as a folder name"),
    ("recipe", "name", "\x07", "usable as a folder name"),
    ("recipe", "model", [], "model is"),
    ("recipe", "target", [], "target"),
    ("recipe", "context_length", HUGE, "context_length"),
    ("recipe", "context_length", True, "context_length is"),
    ("recipe", "bits_per_weight", float("nan"), "bits_per_weight is"),
    ("recipe", "activation_percentile", HUGE, "activation_percentile is"),
    ("manifest", "files", [1], "files[0] is 1"),
    ("manifest", "files.0.bytes", HUGE, ACCEPTED),
    ("manifest", "files.0.bytes", None, "bytes is None"),
    ("manifest", "files.0.sha256", [], "sha256 is []"),
    ("manifest", "files.0.name", 3, "name is 3"),
    ("manifest", "recipe", [], "recipe"),
    ("manifest", "recipe.target", [], "target"),
    ("manifest", "recipe.quantize.0.bits", 8.0, "8.0 bits"),
    ("manifest", "recipe.activation_percentile", HUGE, "activation_percentile"),
    ("manifest", "stop_tokens", 3, "stop_tokens is 3"),
    ("manifest", "versions", [], "versions is []"),
    ("report", "created", "yesterday", "was changed after it was written"),
    ("report", "conversion.wall_s", float("nan"), "was changed after it was written"),
    ("report", "conversion.wall_s", "x", "was changed after it was written"),
)
# A file, and its whole content.
FILE_CASES: Final[tuple[tuple[str, bytes, str], ...]] = (
    *(
        (name, content, said)
        for name in ("config", "generation_config", "tokenizer", "index", "manifest")
        for content, said in (
            (b"", "is empty"),
            (b"[", "not valid JSON"),
            (b"[]", "expected an object"),
            (b"\xff\xfe{", "not valid JSON"),
            (b"\xef\xbb\xbf{}", "byte order mark"),
            (LFS, "git lfs pull"),
            (DEEP.encode(), "not valid JSON"),
            (b'{"a":' * 3000, "not valid JSON"),
            (b"9" * 5000, "not valid JSON"),
        )
    ),
    ("chat_template", b"", "is empty"),
    ("chat_template", b"\xff", "not text in UTF-8"),
    ("chat_template", b"{% for x in range(10**9) %}x{% endfor %}", "chat template"),
    ("chat_template", LFS, "git lfs pull"),
    ("recipe", b"", "is empty"),
    ("recipe", b"x", "expected keys and values"),
    ("recipe", b"[]", "expected keys and values"),
    ("recipe", b"? [a]\n: b\n", "cannot be read"),
    ("recipe", b"a: &a [*a]", "anchors and aliases"),
    ("recipe", b"<<: {a: b}\nname: x", "unknown key 'a'"),
    ("recipe", b"1: 2\n", "unknown key 1"),
    ("recipe", b"name: 2001-01-01\nmodel: x\ntarget: cpu\n", "name is"),
    ("recipe", b'name: "\\ud800"\nmodel: x\ntarget: cpu\n', "surrogate"),
    ("recipe", b"!!python/object:os.system x", "cannot be read"),
    ("recipe", b"a: !!binary x", "cannot be read"),
    ("recipe", b"---\na: 1\n---\nb: 2\n", "cannot be read"),
    ("recipe", b"\x00", "cannot be read"),
    ("task", b"", "is empty"),
    ("task", b"\n\n", "is empty"),
    ("task", b"[]\n", "expected an object"),
    ("task", DEEP.encode(), "is not JSON"),
    ("task", b'{"question": "q", "answer": "7", "checker": []}', "checker"),
    ("task", b'{"question": [], "answer": {}}', "as text"),
    ("task", b'\xef\xbb\xbf{"question": "q", "answer": "7"}', ACCEPTED),
    ("task", b"\xff", "not text in UTF-8"),
    ("calibration text", b"", "is empty"),
    ("calibration text", b"{}", "not JSON lines"),
    ("calibration text", b"[" * 5000, "not JSON lines"),
    ("calibration text", b'{"text": "a"}', "holds no text"),
    ("calibration text", b'{"text": "a b c \\ud800 d"}', "not JSON lines"),
    ("calibration text", b'{"text": null}', "not JSON lines"),
    ("calibration text", '{"text": "the cat \u2028 and the dog"}\n'.encode() * 20, ACCEPTED),
    ("task", b'{"question": "\\ud800 3 and 4", "answer": "7"}', "surrogate"),
    ("task", b'{"question": "\\ud83d\\ude00 3 and 4", "answer": "7"}', ACCEPTED),
    ("safetensors", b"", "too few"),
    ("safetensors", b"\x00" * 7, "too few"),
    ("safetensors", b"\xff" * 8, "claims a header"),
    ("safetensors", b"\x02" + b"\x00" * 7 + b"[]", "corrupt header"),
    ("safetensors", LFS, "git lfs pull"),
)
SETTINGS: Final[tuple[tuple[str, str], ...]] = (
    ("x", "expected key=value"),
    ("=", "expected key=value"),
    ("=1", "expected key=value"),
    ("quantize.0.bits=8.0", "8.0 bits"),
    ("quantize.9.bits=8", "has no 'quantize.9.bits'"),
    ("quantize.-1.bits=8", ACCEPTED),
    ("quantize.x.bits=8", "has no"),
    ("quality=[]", "quality [] is unknown"),
    ("quality={}", "quality {} is unknown"),
    ("name=" + "x" * 300, "usable as a folder name"),
    ("name=", "expected a word"),
    ("context_length=" + "9" * 400, "context_length"),
    ("context_length=" + "9" * 5000, "is not YAML"),
    ("context_length=1e999", "context_length is"),
    ("context_length=!!int x", "is not YAML"),
    ("context_length=!!timestamp x", "is not YAML"),
    ("context_length=2001-99-99", "is not YAML"),
    ("context_length=!!int ''", "is not YAML"),
    ("context_length=2001-01-01", "context_length is"),
    ("validate=&a {x: *a}", "is not YAML"),
    ("validate.mean_kld=.inf", "validate has"),
    ("validate.mean_kld=.nan", "validate has"),
    ("a.b.c.d=1", "has no"),
    ("." * 500 + "=1", "--set ..."),
    ("target=qpu", "is unknown"),
    ("target=[]", "target"),
    ("bits_per_weight=" + "9" * 400, "bits_per_weight is"),
)


def _tried(sandbox: Sandbox, name: str, mutant: dict[str, Any], said: str) -> None:
    parser = next(parser for parser in PARSERS if parser.name == name)
    outcome = sandbox.tried(parser, mutant)
    assert outcome.kind == ("refused" if said else "accepted") and said in outcome.why, outcome


@pytest.mark.parametrize("parser", [parser for parser in PARSERS if parser.files], ids=lambda parser: parser.name)
def test_a_whole_file_is_accepted(parser: Parser, sandbox: Sandbox) -> None:
    """Or its mutants would all be refused for another reason than their own."""
    file = sandbox.names(parser.files[0])[0]
    _tried(sandbox, parser.name, {"file": file, "content": sandbox.original(file)}, ACCEPTED)


@pytest.mark.parametrize(("name", "place", "value", "said"), JSON_CASES, ids=lambda value: f"{value!r:.30}")
def test_an_odd_value(name: str, place: str, value: Any, said: str, sandbox: Sandbox) -> None:
    (file,) = next(parser.files for parser in PARSERS if parser.name == name)
    text = sandbox.original(file).decode("utf-8")
    document = _yaml(text) if file.endswith(".yaml") else json.loads(text)
    *above, last = place.replace("\\.", "\0").split(".")
    holder = document
    for key in above:
        holder = holder[int(key) if isinstance(holder, list) else key.replace("\0", ".")]
    holder[last.replace("\0", ".")] = value
    _tried(sandbox, name, {"file": file, "content": json.dumps(document).encode("utf-8", "surrogatepass")}, said)


@pytest.mark.parametrize(("name", "content", "said"), FILE_CASES, ids=lambda value: f"{value!r:.30}")
def test_an_odd_file(name: str, content: bytes, said: str, sandbox: Sandbox) -> None:
    (file,) = next(parser.files for parser in PARSERS if parser.name == name)
    _tried(sandbox, name, {"file": file, "content": content}, said)


@pytest.mark.parametrize(("value", "said"), SETTINGS, ids=lambda value: f"{value!r:.30}")
def test_an_odd_setting(value: str, said: str, sandbox: Sandbox) -> None:
    _tried(sandbox, "set", {"value": value}, said)


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)
