"""The smallest checkpoint that becomes a bundle: 100 kB, so that a hundred thousand damaged ones are cheap."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.gguf_files import GgufFile, Stored, byte_vocabulary, f32, stored_name

VOCABULARY: Final = 264
HIDDEN: Final = 64
CONTEXT: Final = 64
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 260,
    "eos_token_id": 261,
    "use_sliding_window": False,
}
GENERATION: Final[dict[str, Any]] = {
    "bos_token_id": 260,
    "eos_token_id": [261],
    "pad_token_id": 262,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.05,
}
TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}u{{ m['content'] }}{% else %}"
    "a{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
_ADDED: Final = {260: "<b>", 261: "<e>", 262: "<p>", 263: "<think>"}


def make_smallest(folder: Path) -> Path:
    """Writes the checkpoint, its weights in two shards with an index, and returns the folder."""
    folder.mkdir(parents=True)
    texts = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<b>",
            "eos_token": "<e>",
            "pad_token": {"content": "<p>", "lstrip": False, "rstrip": False, "special": True},
            "add_bos_token": False,
            "model_max_length": CONTEXT,
            "chat_template": TEMPLATE,
        },
        "special_tokens_map.json": {"bos_token": "<b>", "eos_token": {"content": "<e>"}},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    tensors = _tensors()
    names = sorted(tensors)
    shards = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for shard, held in shards.items():
        (folder / shard).write_bytes(safetensors({name: tensors[name] for name in held}))
    index = {name: shard for shard, held in shards.items() for name in held}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """A file of float16 tensors, as the format's description says and not as this project reads it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        raw = values.astype("<f2").tobytes()
        header[name] = {"dtype": "F16", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def smallest_gguf() -> GgufFile:
    """The same weights in a GGUF file, the linears in blocks of 4 and of 8 bits, with a vocabulary of bytes."""
    vocabulary = byte_vocabulary(VOCABULARY)
    # One merge, whose token takes the place of the first unused one.
    at = vocabulary["tokenizer.ggml.tokens"].index("[PAD0]")
    vocabulary["tokenizer.ggml.tokens"][at], vocabulary["tokenizer.ggml.token_type"][at] = "th", 1
    metadata = {
        "general.architecture": "qwen2",
        "qwen2.block_count": 1,
        "qwen2.context_length": CONTEXT,
        "qwen2.embedding_length": HIDDEN,
        "qwen2.feed_forward_length": HIDDEN,
        "qwen2.attention.head_count": 2,
        "qwen2.attention.head_count_kv": 1,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2.rope.freq_base": 10000.0,
        "tokenizer.chat_template": TEMPLATE,
        **vocabulary,
        "tokenizer.ggml.merges": ["t h"],
    }
    tensors = dict[str, Stored]()
    for k, (name, values) in enumerate(_tensors().items()):
        # Type 2 is Q4_0, of 16 bytes behind a float16 scale for 32 weights, type 8 is Q8_0, of 32.
        number, nbytes = ((2, 16), (8, 32))[k % 2]
        blocks = values.size // 32 if "proj.weight" in name else 0
        raw = b"".join(b"\x00\x20" + bytes((7 * k + j) % 251 for j in range(nbytes)) for k in range(blocks))
        stored = Stored(number, values.shape, raw) if blocks else f32(values.astype(np.float32))
        tensors[stored_name(name)] = stored
    return GgufFile(metadata, tensors)


def _tensors() -> dict[str, np.ndarray]:
    """The weights of one layer, seeded."""
    random = np.random.default_rng(0)
    layer, kv = "model.layers.0", HIDDEN // 2
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}.self_attn.q_proj.bias": (HIDDEN,),
        f"{layer}.self_attn.k_proj.weight": (kv, HIDDEN),
        f"{layer}.self_attn.k_proj.bias": (kv,),
        f"{layer}.self_attn.v_proj.weight": (kv, HIDDEN),
        f"{layer}.self_attn.v_proj.bias": (kv,),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **{f"{layer}.mlp.{part}_proj.weight": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")},
    }
    return {name: random.normal(0, 0.3, shape) for name, shape in shapes.items()}


def _tokenizer() -> dict[str, Any]:
    """A byte-level BPE of every byte (GPT-2's signs for them) and two merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    signs = [*map(chr, plain), *(chr(256 + k) for k in range(len(others)))]
    vocabulary = {sign: k for k, sign in enumerate([*signs, "th", "Ġt"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": number < 263,
            }
            for number, text in _ADDED.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["t", "h"], ["Ġ", "t"]],
        },
    }
