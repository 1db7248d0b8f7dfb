"""Expressions of a chat template, written so that onnxruntime-genai's engine gives what jinja2 gives.

The engine is like minja: it knows part of jinja2's filters, tests and methods, has no `in` for strings, keeps none and
undefined apart in few places, makes truth values of `and`, and takes an empty dictionary for true.
"""

from __future__ import annotations

import re
from typing import Any, Final

from jinja2 import nodes

from toolkit.bundle.template_names import INPUTS, Names, Scope
from toolkit.errors import UnsupportedError

# A node that is known by what it is asked for: jinja2 types the parts of nodes as any node, or none.
Node = Any

MAX_CHARACTERS: Final = 1 << 20
_COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">="}
_TEST_COMPARISONS: Final = {
    **{name: name for name in _COMPARISONS},
    "equalto": "eq",
    "==": "eq",
    "!=": "ne",
    "<": "lt",
    "lessthan": "lt",
    "<=": "lteq",
    "le": "lteq",
    ">": "gt",
    "greaterthan": "gt",
    ">=": "gteq",
    "ge": "gteq",
}
_OPERATORS: Final = {
    nodes.Add: "+",
    nodes.Sub: "-",
    nodes.Mul: "*",
    nodes.Mod: "%",
    nodes.FloorDiv: "//",
    nodes.Pow: "**",
}
_TYPES: Final = ("boolean", "integer", "float", "string", "mapping", "iterable", "none")
_IDENTIFIER: Final = re.compile(r"(?!(?:not|is|and|or|del)\b)[a-zA-Z_][a-zA-Z0-9_]*\Z")
_LOOP_NEIGHBOURS: Final = ("previtem", "nextitem")
_STRING_RESULTS: Final = ("trim", "lower", "upper", "tojson", "join", "string", "replace", "title", "capitalize")


class Expressions:
    """Writes expressions of one template. `exact` keeps apart none and undefined, true and empty, wherever it can.

    `changes` collects what was written in another way; `prelude` are statements that have to stand before the one that
    holds the expression.
    """

    def __init__(self, names: Names, exact: bool) -> None:
        self.names, self.exact = names, exact
        self.changes: set[str] = set()
        self.prelude: list[str] = []

    def write(self, node: Node, scope: Scope) -> str:
        """The expression's value. Raises UnsupportedError for what cannot be said in the engine's language."""
        writer = getattr(self, f"_{type(node).__name__.lower()}", None)
        if writer is None:
            raise UnsupportedError(f"the chat template has a {type(node).__name__} that no rewriting is known for")
        text: str = writer(node, scope)
        if len(text) > MAX_CHARACTERS:
            raise UnsupportedError("the chat template grows beyond 1 MiB where it is written for onnxruntime-genai")
        return text

    def part(self, node: Node, scope: Scope) -> str:
        """The expression as an operand: in parentheses unless it is a name, a constant or an access."""
        text = self.write(node, scope)
        simple = isinstance(node, nodes.Name | nodes.List | nodes.Dict) or is_access(node)
        if isinstance(node, nodes.Const):
            simple = not (isinstance(node.value, int | float) and not isinstance(node.value, bool) and node.value < 0)
        return text if simple or _is_closed(text) else f"({text})"

    def condition(self, node: Node, scope: Scope) -> str:
        """The expression where only its truth counts."""
        if isinstance(node, nodes.And | nodes.Or):
            word = "and" if isinstance(node, nodes.And) else "or"
            sides = [self._side(side, scope, type(node)) for side in (node.left, node.right)]
            return f" {word} ".join(sides)
        if isinstance(node, nodes.Not):
            return f"not ({self.condition(node.node, scope)})"
        text = self.part(node, scope)
        read = isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem) or (
            isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
        )
        if self.exact and read and type_of(node) == "":
            self.changes.add("an empty dictionary is false")
            return f"({text} and ({text} is not mapping or ({text}|length) > 0))"
        return text

    def _side(self, node: Node, scope: Scope, kind: type[Node]) -> str:
        text = self.condition(node, scope)
        chained = isinstance(node, nodes.And | nodes.Or) and type(node) is not kind
        return f"({text})" if chained or isinstance(node, nodes.CondExpr) else text

    def shown(self, node: Node, scope: Scope) -> str:
        """The expression as text that is put out or joined to other text."""
        if self.exact and isinstance(node, nodes.Getattr | nodes.Getitem) and (key := constant_key(node)) is not None:
            self.changes.add("none is written as None, undefined as nothing")
            value, base = self.part(node, scope), self.part(node.node, scope)
            return f"('None' if {value} is none and {quoted(key)} in {base} else ({value}|default('')))"
        return self.write(node, scope)

    # Constants and names

    def _const(self, node: nodes.Const, scope: Scope) -> str:
        return constant(node.value)

    def _templatedata(self, node: nodes.TemplateData, scope: Scope) -> str:
        return quoted(node.data)

    def _name(self, node: nodes.Name, scope: Scope) -> str:
        given = scope.name_of(node.name)
        if given != node.name:
            self.changes.add("variables that the engine would mix up have names of their own")
        return given

    def _nsref(self, node: nodes.NSRef, scope: Scope) -> str:
        return f"{scope.name_of(node.name)}.{node.attr}"

    def _list(self, node: nodes.List, scope: Scope) -> str:
        return "[" + ", ".join(self.part(item, scope) for item in node.items) + "]"

    def _tuple(self, node: nodes.Tuple, scope: Scope) -> str:
        return "[" + ", ".join(self.part(item, scope) for item in node.items) + "]"

    def _dict(self, node: nodes.Dict, scope: Scope) -> str:
        pairs = (f"{self.part(pair.key, scope)}: {self.part(pair.value, scope)}" for pair in node.items)
        return "{" + ", ".join(pairs) + "}"

    # Operators

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> str:
        operator = _OPERATORS[type(node)]
        if isinstance(node, nodes.Mod) and type_of(node.left) == "string":
            raise UnsupportedError("the chat template formats text with %, which onnxruntime-genai cannot")
        chained = isinstance(node, nodes.Add) and isinstance(node.left, nodes.Add)
        left = self.write(node.left, scope) if chained else self.part(node.left, scope)
        return f"{left} {operator} {self.part(node.right, scope)}"

    _add = _sub = _mul = _mod = _floordiv = _pow = _binary

    def _div(self, node: nodes.Div, scope: Scope) -> str:
        self.changes.add("/ divides as in Python")
        return f"1.0 * {self.part(node.left, scope)} / {self.part(node.right, scope)}"

    def _neg(self, node: nodes.Neg, scope: Scope) -> str:
        return f"-{self.part(node.node, scope)}"

    def _pos(self, node: nodes.Pos, scope: Scope) -> str:
        return self.part(node.node, scope)

    def _not(self, node: nodes.Not, scope: Scope) -> str:
        return self.condition(node, scope)

    def _and(self, node: nodes.And, scope: Scope) -> str:
        if type_of(node.left) == "boolean" and type_of(node.right) == "boolean":
            return self.condition(node, scope)
        self.changes.add("`and` gives one of its sides")
        left = self.part(node.left, scope)
        return f"({self.part(node.right, scope)} if {self.condition(node.left, scope)} else {left})"

    def _or(self, node: nodes.Or, scope: Scope) -> str:
        if self.exact and type_of(node.left) == "":
            left = self.part(node.left, scope)
            return f"({left} if {self.condition(node.left, scope)} else {self.part(node.right, scope)})"
        chained = isinstance(node.left, nodes.Or)
        left = self.write(node.left, scope) if chained else self.part(node.left, scope)
        return f"{left} or {self.part(node.right, scope)}"

    def _condexpr(self, node: nodes.CondExpr, scope: Scope) -> str:
        test, then = self.condition(node.test, scope), self.part(node.expr1, scope)
        otherwise = f" else {self.part(node.expr2, scope)}" if node.expr2 is not None else ""
        return f"({then} if {test}{otherwise})"

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        parts = []
        for item in node.nodes:
            text = self.part(item, scope)
            if type_of(item) == "":
                shown = self.shown(item, scope)
                self.changes.add("undefined joins as nothing")
                text = shown if shown != text and self.exact else f"({text}|default(''))"
            parts.append(text)
        return "(" + " ~ ".join(parts) + ")"

    def _compare(self, node: nodes.Compare, scope: Scope) -> str:
        left, written = node.expr, []
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                text = self._contains(left, operand.expr, scope)
                written.append(f"not {text}" if operand.op == "notin" else text)
            else:
                written.append(f"{self.part(left, scope)} {_COMPARISONS[operand.op]} {self.part(operand.expr, scope)}")
            left = operand.expr
        return " and ".join(written) if len(written) > 1 else written[0]

    def _contains(self, item: Node, whole: Node, scope: Scope) -> str:
        """`item in whole`, which the engine takes for false where `whole` is text."""
        value, text, known = self.part(item, scope), self.part(whole, scope), type_of(whole)
        if known in ("list", "mapping") or (isinstance(item, nodes.Const) and not isinstance(item.value, str)):
            return f"({value} in {text})"
        self.changes.add("`in` finds text in text")
        some = f"(({text}.split({value})|length) > 1)"
        if not (isinstance(item, nodes.Const) and item.value):
            some = f"({value} == '' or {some})"
        return some if known == "string" else f"(({text} is string and {some}) or ({value} in {text}))"

    # Accesses

    def _getattr(self, node: nodes.Getattr, scope: Scope) -> str:
        base = self._base(node.node, scope)
        return f"{base}.{node.attr}" if _IDENTIFIER.match(node.attr) else f"{base}[{quoted(node.attr)}]"

    def _base(self, node: Node, scope: Scope) -> str:
        return self.part(node, scope)

    def _getitem(self, node: nodes.Getitem, scope: Scope) -> str:
        base = self._base(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            return self._sliced(base, node.arg, scope)
        index = self.write(node.arg, scope)
        if type_of(node.node) == "string" or (self.exact and whole_number(node.arg) is not None):
            end = "" if index == "-1" else f"{(whole_number(node.arg) or 0) + 1}"
            if whole_number(node.arg) is None:
                end = f"{self.part(node.arg, scope)} + 1"
            self.changes.add("a character of a text is a piece of it")
            piece = f"{base}[{index}:{end}]"
            return piece if type_of(node.node) == "string" else f"({piece} if {base} is string else {base}[{index}])"
        return f"{base}[{index}]"

    def _sliced(self, base: str, node: nodes.Slice, scope: Scope) -> str:
        """A slice. The engine does not stop at the end of a list."""
        ends = [node.start, node.stop, node.step]
        start, stop, step = ("" if end is None else self.write(end, scope) for end in ends)
        text = f"{base}[{start}:{stop}:{step}]" if step else f"{base}[{start}:{stop}]"
        limit, first = whole_number(node.stop), whole_number(node.start)
        if step:
            return text
        if limit is not None and limit > 0:
            self.changes.add("a slice ends where its list ends")
            return f"({text} if ({base}|length) > {limit} else {base}[{start}:])"
        if first is not None and first < 0:
            self.changes.add("a slice ends where its list ends")
            return f"({text} if ({base}|length) >= {-first} else {base}[:{stop}])"
        return text

    # Tests

    def _test(self, node: Node, scope: Scope) -> str:
        name, arguments = node.name, node.args
        if name in ("defined", "undefined"):
            return self._defined(node.node, scope, name == "defined")
        if name in _TEST_COMPARISONS and len(arguments) == 1:
            operand = nodes.Operand(_TEST_COMPARISONS[name], arguments[0])
            return f"({self._compare(nodes.Compare(node.node, [operand]), scope)})"
        text = self.part(node.node, scope)
        if name == "in" and len(arguments) == 1:
            return self._contains(node.node, arguments[0], scope)
        if name in ("sameas", "true", "false"):
            wanted = self.part(arguments[0], scope) if arguments else name
            return (
                f"({text} is boolean and {text} == {wanted})" if wanted in ("true", "false") else f"{text} == {wanted}"
            )
        if name == "none" and self.exact and (key := constant_key(node.node)) is not None and is_access(node.node):
            base = self.part(node.node.node, scope)
            return f"({text} is none and {quoted(key)} in {base})"
        if name in _TYPES:
            return f"{text} is {name}"
        written = {
            "sequence": f"{text} is iterable",
            "number": f"({text} is number or {text} is boolean)",
            "even": f"({text} % 2 == 0)",
            "odd": f"({text} % 2 == 1)",
            "lower": f"({text} == ({text}|lower))",
        }
        if name == "divisibleby" and len(arguments) == 1:
            written[name] = f"({text} % {self.part(arguments[0], scope)} == 0)"
        if name not in written:
            raise UnsupportedError(f"the chat template tests whether something `is {name}`, which is not known")
        self.changes.add(f"the test `{name}`")
        return written[name]

    def _defined(self, node: Node, scope: Scope, wanted: bool) -> str:
        """Writes `is defined`, which the engine answers with true where a variable is there and not none."""
        if isinstance(node, nodes.Name) and scope.find(node.name) is None:
            if node.name in INPUTS or node.name in ("raise_exception", "strftime_now", "namespace", "range"):
                return "true" if wanted else "false"
        key = constant_key(node)
        if key is not None and is_access(node) and key not in _LOOP_NEIGHBOURS:
            self.changes.add("none is defined")
            text = f"({quoted(key)} in {self.part(node.node, scope)})"
            return text if wanted else f"not {text}"
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice) and type_of(node.arg) != "string":
            self.changes.add("what lies beyond a list is undefined")
            base, index = self.part(node.node, scope), self.part(node.arg, scope)
            number = whole_number(node.arg)
            text = f"(({base}|length) >= {-number})" if number is not None and number < 0 else ""
            there = f"(({base}|length) > {index})"
            text = text or (there if number is not None else f"({index} in {base} if {base} is mapping else {there})")
            return text if wanted else f"not {text}"
        return f"{self.part(node, scope)} is {'' if wanted else 'not '}defined"


def constant(value: object) -> str:
    """A constant as the engine reads it."""
    if isinstance(value, str):
        return quoted(value)
    if value is None:
        return "None"
    return str(value).lower() if isinstance(value, bool) else str(value)


def quoted(text: str) -> str:
    """Text as a string of the engine, whose escapes are fewer than Python's."""
    quote = '"' if "'" in text and '"' not in text else "'"
    for character, written in (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"), (quote, "\\" + quote)):
        text = text.replace(character, written)
    return f"{quote}{text}{quote}"


def type_of(node: Node) -> str:
    """What an expression is sure to be: string, list, mapping, number, boolean; empty where that is not known."""
    if isinstance(node, nodes.Const):
        known = {str: "string", bool: "boolean", int: "number", float: "number"}
        return known.get(type(node.value), "none")
    if isinstance(node, nodes.Compare | nodes.Test | nodes.Not):
        return "boolean"
    if isinstance(node, nodes.Concat | nodes.TemplateData):
        return "string"
    if isinstance(node, nodes.List | nodes.Tuple):
        return "list"
    if isinstance(node, nodes.Dict):
        return "mapping"
    if isinstance(node, nodes.And | nodes.Or):
        return "boolean" if type_of(node.left) == type_of(node.right) == "boolean" else ""
    if isinstance(node, nodes.Filter):
        return "string" if node.name in _STRING_RESULTS else "number" if node.name in ("length", "count", "int") else ""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return "string" if node.node.attr in ("strip", "lstrip", "rstrip", "lower", "upper", "replace", "join") else ""
    return "string" if isinstance(node, nodes.Add) and "string" in (type_of(node.left), type_of(node.right)) else ""


def is_access(node: Node) -> bool:
    """Whether an expression is a name, or attributes and items of one."""
    return isinstance(node, nodes.Getattr) or (
        isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice)
    )


def _is_closed(text: str) -> bool:
    """Whether a text is one pair of parentheses with what is between them."""
    if not text.startswith("(") or not text.endswith(")") or "'" in text or '"' in text:
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return False
    return True


def constant_key(node: Node) -> str | None:
    """The key that an access names as a constant."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None


def whole_number(node: Node) -> int | None:
    """The whole number that a constant is, with its sign."""
    if isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const) and type(node.node.value) is int:
        return -node.node.value
    return node.value if isinstance(node, nodes.Const) and type(node.value) is int else None
