"""Headers of weights, damaged by themselves: a bit of the numbers behind them is only another number."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, Final

from tests.gguf_files import GgufFile, Stored, typed
from tests.hostile.mutants import damaged_bytes
from tests.hostile.smallest import smallest_gguf

_LENGTHS: Final = (0, 1, 31, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
_TEXTS: Final = ("", "x", "é" * 40, "llama", "gpt2", "../x", "\x00", "x" * 70_000, "{{ x }}", "%s%n")


def header_bytes(form: str, content: bytes) -> int:
    """How many bytes of a file of weights stand before its tensors' own."""
    if form == "safetensors":
        return 8 + int(struct.unpack("<Q", content[:8])[0])
    return len(_gguf().header())


def damaged_header(form: str, content: bytes, random: Random) -> bytes:
    """The file with bytes of its header changed."""
    nbytes = header_bytes(form, content)
    return damaged_bytes(content[:nbytes], random) + content[nbytes:]


def safetensors_header(content: bytes) -> Any:
    """The JSON document that a safetensors file begins with."""
    return json.loads(content[8 : header_bytes("safetensors", content)])


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another document before its bytes, and that document's length."""
    return struct.pack("<Q", len(header)) + header + content[header_bytes("safetensors", content) :]


def damaged_gguf(random: Random) -> bytes:
    """The smallest GGUF file with one to three places of its header changed: keys, values with their types, tensors'
    names, shapes, types and offsets, counts, version, alignment."""
    whole = _gguf()
    made = replace(whole, metadata=dict(whole.metadata), tensors=dict(whole.tensors), offsets={})
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(_CHANGES)(made, random)
    return made.content()


@cache
def _gguf() -> GgufFile:
    return smallest_gguf()


def _value(made: GgufFile, random: Random) -> None:
    made.metadata[_key(made, random)] = _odd(random)


def _another_number(made: GgufFile, random: Random) -> None:
    numbers = [key for key, value in made.metadata.items() if isinstance(value, int | float)]
    if numbers:
        made.metadata[random.choice(numbers)] = random.choice(
            (0, 1, -1, 3, 2**31 - 1, -(2**31), 0.0, 1e-30, 1e30, float("nan"), float("inf"), True)
        )


def _gone(made: GgufFile, random: Random) -> None:
    del made.metadata[_key(made, random)]


def _renamed(made: GgufFile, random: Random) -> None:
    key = _key(made, random)
    made.metadata[random.choice((*_TEXTS, *made.metadata, key.upper()))] = made.metadata.pop(key)


def _entry(made: GgufFile, random: Random) -> None:
    """One entry of a list is another, gone, or there twice."""
    lists = [key for key, value in made.metadata.items() if isinstance(value, list) and value]
    if not lists:
        return
    key = random.choice(lists)
    entries, at = list(made.metadata[key]), random.randrange(len(made.metadata[key]))
    how = random.choice(("other", "gone", "twice", "cut"))
    if how == "other":
        entries[at] = random.choice(_TEXTS) if isinstance(entries[at], str) else random.choice((-1, 0, 99, 2**31 - 1))
    elif how == "cut":
        del entries[max(at, 1) :]
    else:
        entries[at : at + 1] = [] if how == "gone" and len(entries) > 1 else [entries[at]] * 2
    made.metadata[key] = entries


def _tensor(made: GgufFile, random: Random) -> None:
    """A tensor has another name, shape, type or place."""
    if not made.tensors:
        return
    name = random.choice([*made.tensors])
    stored = made.tensors.pop(name)
    how = random.choice(("name", "shape", "type", "offset", "gone"))
    if how == "name":
        name = random.choice((*_TEXTS, *made.tensors, name + ".weight", "blk.99999999.attn_q.weight"))
    elif how == "shape":
        lengths = list(stored.shape)
        lengths[random.randrange(len(lengths))] = random.choice(_LENGTHS)
        stored = Stored(stored.type_number, tuple(random.choice((lengths, lengths * 5, []))), stored.raw)
    elif how == "type":
        stored = Stored(random.choice((*range(42), 99, 2**32 - 1)), stored.shape, stored.raw)
    elif how == "offset":
        made.offsets[name] = random.choice(_LENGTHS)
    if how != "gone":
        made.tensors[name] = stored


def _claim(made: GgufFile, random: Random) -> None:
    """A number of the header's first bytes, or how tensors are aligned, is another."""
    how = random.choice(("tensors", "keys", "version", "alignment", "key of alignment"))
    if how == "tensors":
        made.claimed_tensors = random.choice(_LENGTHS)
    elif how == "keys":
        made.claimed_keys = random.choice(_LENGTHS)
    elif how == "version":
        made.version = random.choice((0, 1, 2, 4, 2**32 - 1, 3 << 24))
    elif how == "alignment":
        made.alignment = random.choice((1, 2, 8, 64, 4096))
    else:
        made.metadata["general.alignment"] = random.choice((0, 1, 3, -1, 64, 2**31 - 1))


def _key(made: GgufFile, random: Random) -> str:
    made.metadata.setdefault("general.name", "x")
    return random.choice([*made.metadata])


def _odd(random: Random) -> bytes:
    """A value's type and bytes, as they may be and as they may not."""
    known = (0, 1, True, 0.5, *_TEXTS, [1], [True, False], ["x"], [0.5], [1] * 3000)
    length = struct.pack("<Q", random.choice(_LENGTHS))
    deep = struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * random.choice((1, 3, 3000))
    return random.choice(
        (
            typed(random.choice(known)),
            struct.pack("<I", random.choice((*range(14), 99, 2**32 - 1))) + random.randbytes(8),
            struct.pack("<I", 8) + length + b"x",
            struct.pack("<II", 9, random.randrange(14)) + length,
            struct.pack("<IQ", 8, 2) + b"\xff\xfe",
            deep + typed(1),
        )
    )


_CHANGES: Final[tuple[Callable[[GgufFile, Random], None], ...]] = (
    _value,
    _another_number,
    _gone,
    _renamed,
    _entry,
    _tensor,
    _tensor,
    _claim,
)
