"""Damaged files: bytes changed at random, and JSON of the right shape with something odd in one of its places."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any, Final

from hypothesis import strategies

# What a key may hold and no reader expects. Each has brought down a parser somewhere.
ODD_VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\x00",
    "\ud800",
    "é" * 40,
    "../../x",
    "/etc/passwd",
    "x" * 70_000,
    "%s%d%n",
    "{{ x }}",
    "model.onnx",
    [],
    {},
    [[]],
    [None],
    [0] * 3000,
    {"": ""},
    {"content": 3},
)
# What stands for something else where text is read: YAML's tags and anchors, jinja's blocks, line ends.
ODD_TEXTS: Final = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    "\u2028".encode(),
    b"\r",
    b"\n",
    b"\t",
    b"&a [*a]",
    b"*a",
    b"!!int x",
    b"!!timestamp x",
    b"!!binary x",
    b"!!set {x}",
    b"!!omap [x]",
    b"!!python/object:os.system x",
    b"2001-99-99",
    b"2001-01-01",
    b"1:60:60",
    b"0x_",
    b"<<: {a: b}",
    b"? [a]\n: b\n",
    b"---\n",
    b"...\n",
    b"[" * 3000,
    b"{a: " * 300,
    b"{{",
    b"{% for x in range(10**9) %}x{% endfor %}",
    b"{% raise %}",
    b"{{ 1 / 0 }}",
    b"{{ messages.x.y }}",
    b"{% set x = 'a' * 1000000 %}",
    b"9" * 400,
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'"',
    b"'",
    b"\\ud800",
    b"\\",
    b"../",
    b"version https://git-lfs.github.com/spec/v1\n",
)


# Where a value of YAML stands: anchors within anchors, aliases of what is around them, tags, merges, and depths.
_YAML_VALUES: Final = (
    b"&a [" + b", ".join([b"x"] * 9) + b"]",
    b"[&a [x, x, x, x, x, x, x, x, x]"
    + b"".join(b", &%c [%s]" % (98 + k, b", ".join([b"*%c" % (97 + k)] * 9)) for k in range(9))
    + b"]",
    b"&a {x: *a}",
    b"&a [&b [*a, *b]]",
    b"{<<: &a {bits: 4}, <<: *a}",
    b"{<<: [x]}",
    b"{? {x: y} : z}",
    b"!!int 99",
    b"!!int ''",
    b"!!float x",
    b"!!bool maybe",
    b"!!null x",
    b"!!str 4",
    b"!!seq {}",
    b"!!map []",
    b"!!pairs [x]",
    b"!!timestamp 2001-99-99",
    b"!!binary ====",
    b"!!python/object/apply:os.getcwd []",
    b"!local x",
    b"!<tag:yaml.org,2002:int> x",
    b"190:20:30",
    b"0b2",
    b"0o9",
    b".inf",
    b".nan",
    b"-.INF",
    b"1_000",
    b"~",
    b"on",
    b"|\n  x",
    b">-\n",
    b"%YAML 9.9",
    b"@x",
    b"`x",
    b"[" * 200,
    b"{a: " * 60 + b"1" + b"}" * 60,
    b"[" * 60 + b"]" * 60,
    b"'" + b"x" * 5000 + b"'",
)


def damaged_yaml(content: bytes, random: Random) -> bytes:
    """`content` with one or two of its values, behind `: `, `- ` or `=`, replaced by something odd of YAML."""
    for _ in range(random.choice((1, 1, 2))):
        starts = [k + 1 for k in range(1, len(content)) if content[k - 1 : k + 1] in (b": ", b"- ") or content[k] == 61]
        if not starts:
            break
        at = random.choice(starts)
        ends = [k for k in (content.find(sign, at) for sign in (b"\n", b",", b"}")) if k >= 0]
        value = random.choice(_YAML_VALUES)
        value = random.choice((value, b"&a " + value, b"*a", b"!!str " + value))
        content = content[:at] + value + content[min(ends, default=len(content)) :]
    return content


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """`content` with one to four changes: bits, bytes, pieces that go, come twice, move, or are something else."""
    made = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(_CHANGES)(made, random)
    return bytes(made)


def _flip(made: bytearray, random: Random) -> None:
    if made:
        made[random.randrange(len(made))] ^= 1 << random.randrange(8)


def _put(made: bytearray, random: Random) -> None:
    if made:
        made[random.randrange(len(made))] = random.randrange(256)


def _remove(made: bytearray, random: Random) -> None:
    start = random.randrange(len(made) + 1)
    del made[start : start + random.choice((1, 2, 8, 64, 4096))]


def _cut(made: bytearray, random: Random) -> None:
    del made[random.randrange(len(made) + 1) :]


def _zero_tail(made: bytearray, random: Random) -> None:
    start = random.randrange(len(made) + 1)
    made[start:] = bytes(len(made) - start)


def _again(made: bytearray, random: Random) -> None:
    start = random.randrange(len(made) + 1)
    piece = made[start : start + random.choice((1, 8, 64, 512))]
    at = random.randrange(len(made) + 1)
    made[at:at] = piece


def _insert(made: bytearray, random: Random) -> None:
    at = random.randrange(len(made) + 1)
    made[at:at] = random.choice(ODD_TEXTS)


def _overwrite(made: bytearray, random: Random) -> None:
    text = random.choice(ODD_TEXTS)
    at = random.randrange(len(made) + 1)
    made[at : at + len(text)] = text


def _length(made: bytearray, random: Random) -> None:
    """A whole number where headers and protobufs have lengths."""
    at = random.choice((0, random.randrange(len(made) + 1)))
    value = random.choice((0, 1, 7, 8, 255, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
    made[at : at + 8] = value.to_bytes(8, "little")


def _number(made: bytearray, random: Random) -> None:
    """Another number in the place of one that is written out."""
    places = [k for k, byte in enumerate(made) if 48 <= byte <= 57]
    if places:
        at = random.choice(places)
        made[at : at + 1] = random.choice((b"0", b"9" * 400, b"-1", b"1e400", b"2147483648", b"true", b'"', b"[]"))


_CHANGES: Final[tuple[Callable[[bytearray, Random], None], ...]] = (
    _flip,
    _put,
    _remove,
    _cut,
    _zero_tail,
    _again,
    _insert,
    _overwrite,
    _length,
    _number,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document, its own first; of long lists and objects the first forty entries."""
    found = [at]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries)[:40]:
        found += places(entry, (*at, key))
    return found


def damaged_json(document: Any) -> strategies.SearchStrategy[bytes]:
    """Text of the document with one to three places changed: something odd, gone, renamed, wrapped, from elsewhere."""
    odd = strategies.one_of(
        strategies.integers(0, len(ODD_VALUES) - 1).map(ODD_VALUES.__getitem__),
        strategies.recursive(
            strategies.one_of(
                strategies.none(),
                strategies.booleans(),
                strategies.integers(),
                # A bundle that was opened in this process has turned subnormal numbers off.
                strategies.floats(allow_subnormal=False),
                strategies.text(max_size=8),
            ),
            lambda inner: strategies.one_of(
                strategies.lists(inner, max_size=3),
                strategies.dictionaries(strategies.text(max_size=4), inner, max_size=3),
            ),
            max_leaves=6,
        ),
    )
    kind = strategies.sampled_from(("odd", "odd", "odd", "odd", "gone", "renamed", "wrapped", "elsewhere", "deep"))
    found = places(document)
    place = strategies.integers(0, len(found) - 1).map(found.__getitem__)
    one = strategies.tuples(kind, place, place, odd)
    return strategies.lists(one, min_size=1, max_size=3).map(lambda edits: _edited(document, edits))


def _edited(document: Any, edits: list[tuple[str, tuple[Any, ...], tuple[Any, ...], Any]]) -> bytes:
    made = {"": copy.deepcopy(document)}
    for kind, at, other, odd in edits:
        _edit(made, kind, ("", *at), ("", *other), odd)
    text = json.dumps(made.get(""))
    # A marker for what `json.dumps` would take for a text.
    return text.replace('"<deep>"', "[" * 3000 + "]" * 3000).encode("utf-8", "surrogatepass")


def _edit(made: dict[str, Any], kind: str, at: tuple[Any, ...], other: tuple[Any, ...], odd: Any) -> None:
    holder = _reached(made, at[:-1])
    if not (isinstance(holder, dict) and at[-1] in holder) and not (
        isinstance(holder, list) and isinstance(at[-1], int) and at[-1] < len(holder)
    ):
        return
    if kind == "gone" and len(at) > 1:
        del holder[at[-1]]
    elif kind == "renamed" and isinstance(holder, dict) and len(at) > 1:
        holder[str(odd)[:40]] = holder.pop(at[-1])
    elif kind == "wrapped":
        holder[at[-1]] = [holder[at[-1]]]
    elif kind == "elsewhere":
        holder[at[-1]] = copy.deepcopy(_reached(made, other))
    elif kind == "deep":
        holder[at[-1]] = "<deep>"
    else:
        holder[at[-1]] = odd


def _reached(made: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        try:
            made = made[key]
        except (KeyError, IndexError, TypeError):
            return None
    return made
