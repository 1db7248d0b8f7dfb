"""Frozen dataclasses to JSON objects and back, and the JSON Schema they keep to.

A field is a key of the same name. What is None in memory is absent in JSON, never null; tuples are arrays. Read back,
a value of another type, or a key that is missing, is a ValueError in one line; keys that no field has are passed over,
so that an older toolkit reads what a newer one wrote.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, cast

Json = object
# A JSON object as a file or another process spells it, where no dataclass stands for it.
JsonObject = dict[str, Any]
Kind = TypeVar("Kind")
_SCALARS: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_WORDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}


def to_json(value: object) -> Json:
    """The JSON value of a dataclass, or of anything one may hold."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: to_json(entry) for name, entry in given.items() if entry is not None}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in value]
    return value


def read_value(kind: object, value: Json, where: str) -> object:
    """What a field of type `kind` holds for a JSON value; `where` begins the message of the ValueError if nothing."""
    return _read(kind, value, where)


def from_json(kind: type[Kind], value: Json, where: str = "the file") -> Kind:
    """The dataclass `kind` that a JSON value spells; `where` begins the message of the ValueError if it does not."""
    return cast(Kind, _read(kind, value, where))


def json_schema(kind: type, title: str) -> dict[str, Json]:
    """The JSON Schema (2020-12) of a dataclass, those that it holds under `$defs`."""
    definitions: dict[str, Json] = {}
    root = _object_schema(kind, definitions)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return {**head, **root, "$defs": dict(sorted(definitions.items()))}


@functools.cache
def field_kinds(kind: type) -> Mapping[str, tuple[Field[object], object]]:
    """The fields of a dataclass with their types, in their order."""
    hints = typing.get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in fields(kind)}


def present_kind(kind: object) -> tuple[object, bool]:
    """A type without its `| None`, and whether it had one: such a field may be absent."""
    if isinstance(kind, types.UnionType):
        given = [entry for entry in typing.get_args(kind) if entry is not type(None)]
        return given[0], len(given) < len(typing.get_args(kind))
    return kind, False


def _read(kind: object, value: Json, where: str) -> object:
    kind, _ = present_kind(kind)
    if kind in _SCALARS:
        return _scalar(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        entries = _expected(value, list, "an array", where)
        return tuple(_read(arguments[0], entry, f"{where}[{k}]") for k, entry in enumerate(entries))
    if origin is dict:
        given = _expected(value, dict, "an object", where)
        return {str(key): _read(arguments[1], entry, f"{where}.{key}") for key, entry in given.items()}
    given = _expected(value, dict, "an object", where)
    found = {}
    for name, (field, inner) in field_kinds(cast(type, kind)).items():
        if name in given:
            found[name] = _read(inner, given[name], f"{where}.{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where} has no {name!r}")
    return cast(type, kind)(**found)


def _scalar(kind: object, value: Json, where: str) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is a whole number of {len(str(value))} digits, expected a number") from None
    if not isinstance(value, cast(type, kind)) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r:.60}, expected {_WORDS[_SCALARS[kind]]}")
    return value


def _expected(value: Json, kind: type[Kind], words: str, where: str) -> Kind:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {value!r:.60}, expected {words}")
    return value


def _object_schema(kind: type, definitions: dict[str, Json]) -> dict[str, Json]:
    properties, required = {}, []
    for name, (_, inner) in field_kinds(kind).items():
        inner, may_lack = present_kind(inner)
        properties[name] = _schema(inner, definitions)
        if not may_lack:
            required.append(name)
    described = " ".join((kind.__doc__ or "").split())
    shape = {"properties": properties, "required": required, "additionalProperties": False}
    return {"description": described, "type": "object", **shape}


def _schema(kind: object, definitions: dict[str, Json]) -> dict[str, Json]:
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    name = cast(type, kind).__name__
    if name not in definitions:
        definitions[name] = {}
        definitions[name] = _object_schema(cast(type, kind), definitions)
    return {"$ref": f"#/$defs/{name}"}
