"""Filters, functions and methods in a chat template: what onnxruntime-genai's engine has, and what stands for the rest.

Text is replaced, joined and cut by splitting it; a filter over a list that the engine does not have becomes a loop
before the statement that holds it.
"""

from __future__ import annotations

import re
from typing import Final

from jinja2 import nodes

from toolkit.bundle.template_expressions import Expressions, Node, constant_key, quoted, type_of, whole_number
from toolkit.bundle.template_names import Scope
from toolkit.errors import UnsupportedError

# Filters that the engine has as jinja2 has them, with how many arguments beside the value.
_FILTERS: Final = {
    "items": 0,
    "lower": 0,
    "count": 0,
    "length": 0,
    "safe": 0,
    "string": 0,
    "dictsort": 0,
    "join": 1,
    "unique": 0,
    "sort": 0,
    "int": 0,
    "escape": 0,
    "e": 0,
}
# Methods of texts and dictionaries that the engine has, with the fewest and the most arguments.
_METHODS: Final = {
    "strip": (0, 1),
    "lstrip": (0, 1),
    "rstrip": (0, 1),
    "title": (0, 0),
    "items": (0, 0),
    "get": (1, 2),
    "startswith": (1, 1),
    "endswith": (1, 1),
    "split": (1, 1),
}
_FUNCTIONS: Final = ("range", "namespace", "raise_exception", "strftime_now", "joiner")
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
# Indented JSON has at most so many levels in which empty lists and objects are closed up.
_JSON_LEVELS: Final = 8
_PLACEHOLDER: Final = re.compile(r"\{(\d*|[a-zA-Z_]\w*)\}")


class EngineExpressions(Expressions):
    """Expressions with their filters and calls."""

    # Filters

    def _filter(self, node: Node, scope: Scope) -> str:
        if node.node is None:
            raise UnsupportedError(f"the chat template has the filter {node.name} where no value stands before it")
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise UnsupportedError(f"the chat template unpacks arguments of the filter {node.name}, which is not known")
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        name = "default" if node.name == "d" else node.name
        if writer := getattr(self, f"_{name}_filter", None):
            text: str = writer(node, scope)
            return text
        if name in ("select", "reject", "selectattr", "rejectattr", "map"):
            return self._over_list(node, scope)
        if name in _FILTERS and len(arguments) <= _FILTERS[name]:
            return self._native(self.part(node.node, scope), name, [self.part(a, scope) for a in arguments])
        if name in ("upper", "replace", "capitalize"):
            value = node.node if type_of(node.node) else nodes.Filter(node.node, "default", [], [], None, None)
            return self._text_method(nodes.Getattr(value, name, "load"), name, arguments, scope)
        if name == "title":
            # The engine begins words after white space alone; a role has no other.
            self.changes.add("the filter `title`")
            return f"{self.part(node.node, scope)}.title()"
        if name == "format" and isinstance(node.node, nodes.Const) and node.node.value == "%s" and len(arguments) == 1:
            return f"({self.part(arguments[0], scope)}|string)"
        raise UnsupportedError(f"the chat template has the filter {name}, which onnxruntime-genai lacks")

    def _native(self, value: str, name: str, arguments: list[str]) -> str:
        return f"({value}|{name}({', '.join(arguments)}))" if arguments else f"({value}|{name})"

    def _trim_filter(self, node: Node, scope: Scope) -> str:
        value = self.part(node.node, scope)
        if node.args:
            return f"{value}.strip({self.part(node.args[0], scope)})"
        if self.exact and not type_of(node.node):
            value = f"({value}|default(''))"
        return self._native(value, "trim", [])

    def _list_filter(self, node: Node, scope: Scope) -> str:
        """A list. Lists, which are most of what it is asked for, are lists already."""
        self.changes.add("lists are lists already")
        return self.part(node.node, scope)

    def _first_filter(self, node: Node, scope: Scope) -> str:
        self.changes.add("the filter `first`")
        value = self.part(node.node, scope)
        if type_of(node.node) == "string":
            return f"{value}[0:1]"
        return f"({value}[0] if ({value}|length) > 0 else None)"

    def _last_filter(self, node: Node, scope: Scope) -> str:
        self.changes.add("the filter `last`")
        value = self.part(node.node, scope)
        if type_of(node.node) == "string":
            return f"{value}[-1:]"
        return f"({value}[-1] if ({value}|length) > 0 else None)"

    def _reverse_filter(self, node: Node, scope: Scope) -> str:
        self.changes.add("the filter `reverse`")
        return f"{self.part(node.node, scope)}[::-1]"

    def _default_filter(self, node: Node, scope: Scope) -> str:
        given = [*node.args, *(keyword.value for keyword in node.kwargs)]
        otherwise = self.part(given[0], scope) if given else "''"
        boolean = len(given) > 1 and not (isinstance(given[1], nodes.Const) and not given[1].value)
        value, key = self.part(node.node, scope), constant_key(node.node)
        if self.exact and key is not None and not boolean:
            return f"({value} if {quoted(key)} in {self.part(node.node.node, scope)} else {otherwise})"
        if boolean:
            return f"({value} if {self.condition(node.node, scope)} else {otherwise})"
        return self._native(value, "default", [otherwise])

    def _tojson_filter(self, node: Node, scope: Scope) -> str:
        value, indent = self.part(node.node, scope), ""
        for keyword in [*(nodes.Keyword("indent", value) for value in node.args), *node.kwargs]:
            is_plain = isinstance(keyword.value, nodes.Const) and not keyword.value.value
            if keyword.key == "indent" and not is_plain:
                indent = self.part(keyword.value, scope)
            elif not is_plain:
                raise UnsupportedError(
                    f"the chat template has tojson({keyword.key}=…), which onnxruntime-genai does not know"
                )
            else:
                self.changes.add("arguments of tojson that change nothing")
        if not indent:
            return self._native(value, "tojson", [])
        text = f"({value}|tojson(indent={indent}))"
        return self._closed_up(text, int(indent)) if indent.isdigit() and self.exact else text

    def _closed_up(self, text: str, indent: int) -> str:
        """Indented JSON with empty lists and objects as `[]` and `{}`, which the engine spreads over lines."""
        self.changes.add("empty lists in indented JSON")
        for level in range(_JSON_LEVELS):
            for begin, end in ("[]", "{}"):
                inner, outer = " " * (indent * (level + 1)), " " * (indent * level)
                text = _replaced(text, quoted(f"{begin}\n{inner}\n{outer}{end}"), quoted(begin + end))
        return text

    def _indent_filter(self, node: Node, scope: Scope) -> str:
        names = dict(zip(("width", "first", "blank"), node.args, strict=False))
        names |= {keyword.key: keyword.value for keyword in node.kwargs}
        width = whole_number(names["width"]) if "width" in names else 4
        plain = all(isinstance(names.get(n, nodes.Const(False)), nodes.Const) for n in ("first", "blank"))
        if width is None or not plain:
            raise UnsupportedError("the chat template indents by what is not a constant, which is not known")
        self.changes.add("the filter `indent`")
        space = " " * width
        text = _replaced(self.part(node.node, scope), quoted("\n"), quoted("\n" + space))
        if not (names.get("blank") and names["blank"].value):
            for _ in range(2):
                text = _replaced(text, quoted(f"\n{space}\n"), quoted("\n\n"))
        return f"({quoted(space)} ~ {text})" if names.get("first") and names["first"].value else text

    # Filters over lists

    def _over_list(self, node: Node, scope: Scope) -> str:
        attribute = next((k.value for k in node.kwargs if k.key == "attribute"), None)
        if node.name == "map" and attribute is not None and len(node.kwargs) == 1 and not node.args:
            key = attribute.value if isinstance(attribute, nodes.Const) else ""
            if isinstance(key, str) and key and "." not in key:
                return f"({self.part(node.node, scope)}|map(attribute={quoted(key)}))"
        self.changes.add(f"the filter `{node.name}`")
        found, item = self.names.unused("found"), self.names.unused("item")
        for name in (found, item):
            scope.declared[name] = name
        element = nodes.Name(item, "load")
        before, self.prelude = self.prelude, []
        kept, condition = self._kept(node, element, scope)
        if self.prelude:
            raise UnsupportedError(f"the chat template has filters over lists within {node.name}, which is not known")
        whole = self.part(node.node, scope)
        opened, closed = (f"{{% if {condition} %}}", "{% endif %}") if condition else ("", "")
        self.prelude = [*before, *self.prelude]
        self.prelude.append(
            f"{{% set {found} = namespace(items=[]) %}}{{% for {item} in {whole} %}}{opened}"
            f"{{% set {found}.items = {found}.items + [{kept}] %}}{closed}{{% endfor %}}"
        )
        return f"{found}.items"

    def _kept(self, node: Node, element: nodes.Name, scope: Scope) -> tuple[str, str]:
        """Returns what a loop keeps of each element of a list, and the condition for it, empty for always."""
        arguments = list(node.args)
        if node.name == "map":
            if not arguments or not isinstance(arguments[0], nodes.Const):
                raise UnsupportedError("the chat template maps a list by what is not a constant, which is not known")
            applied = nodes.Filter(element, arguments[0].value, arguments[1:], node.kwargs, None, None)
            return self.part(applied, scope), ""
        value: Node = element
        if node.name.endswith("attr"):
            if not arguments or not isinstance(arguments[0], nodes.Const):
                raise UnsupportedError(f"the chat template's {node.name} names no constant, which is not known")
            for key in str(arguments.pop(0).value).split("."):
                value = nodes.Getattr(value, key, "load")
        if arguments:
            if not isinstance(arguments[0], nodes.Const):
                raise UnsupportedError(f"the chat template's {node.name} names no test, which is not known")
            value = nodes.Test(value, arguments[0].value, arguments[1:], [], None, None)
        condition = self.condition(value, scope)
        return self.part(element, scope), f"not ({condition})" if node.name.startswith("reject") else condition

    # Calls

    def _call(self, node: nodes.Call, scope: Scope) -> str:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise UnsupportedError("the chat template unpacks arguments of a call, which onnxruntime-genai cannot")
        if isinstance(node.node, nodes.Getattr):
            return self._method(node.node, node, scope)
        if not isinstance(node.node, nodes.Name):
            raise UnsupportedError("the chat template calls what is not a name, which onnxruntime-genai cannot")
        name = node.node.name
        is_own = scope.find(name) is not None
        if name == "dict" and not is_own and not node.args:
            return "{" + ", ".join(f"{quoted(k.key)}: {self.part(k.value, scope)}" for k in node.kwargs) + "}"
        if not is_own and (name not in _FUNCTIONS or (name == "namespace" and node.args)):
            raise UnsupportedError(f"the chat template calls {name}, which onnxruntime-genai does not have")
        given = [self.part(argument, scope) for argument in node.args]
        renamed = self.names.parameters.get(name, {}) if is_own else {}
        given += [f"{renamed.get(k.key, k.key)}={self.part(k.value, scope)}" for k in node.kwargs]
        # Nothing may follow a call but its own parentheses.
        return f"({scope.name_of(name)}({', '.join(given)}))"

    def _method(self, method: nodes.Getattr, call: nodes.Call, scope: Scope) -> str:
        name, arguments = method.attr, list(call.args)
        if isinstance(method.node, nodes.Name) and method.node.name == "loop":
            if name == "cycle" and arguments:
                choices = ", ".join(self.part(argument, scope) for argument in arguments)
                return f"[{choices}][loop.index0 % {len(arguments)}]"
            raise UnsupportedError(f"the chat template calls loop.{name}, which onnxruntime-genai does not have")
        if call.kwargs and name != "format":
            raise UnsupportedError(f"the chat template names arguments of the method {name}, which is not known")
        fewest, most = _METHODS.get(name, (1, 0))
        if fewest <= len(arguments) <= most and not (arguments and type_of(arguments[0]) == "list"):
            base = self._base(method.node, scope)
            return f"{base}.{name}({', '.join(self.part(argument, scope) for argument in arguments)})"
        if name == "format":
            return self._formatted(method.node, call, scope)
        return self._text_method(method, name, arguments, scope)

    def _text_method(self, method: nodes.Getattr, name: str, arguments: list[Node], scope: Scope) -> str:
        """A method that the engine lacks, by what it has."""
        value, given = self._base(method.node, scope), [self.part(argument, scope) for argument in arguments]
        whole = [whole_number(argument) for argument in arguments]
        self.changes.add(f"the method `{name}`")
        match name, given:
            case (("append" | "extend" | "insert" | "pop" | "update"), _):
                # What a sandbox answers to who would change a list or dictionary.
                return f"(raise_exception({quoted(name + ' changes what a template is given')}))"
            case "lower", []:
                return f"({value}|lower)"
            case "upper", []:
                for letter in _LETTERS:
                    value = _replaced(value, quoted(letter), quoted(letter.upper()))
                return value
            case "capitalize", []:
                return f"({value}|lower).capitalize()"
            case "replace", [old, new]:
                return _replaced(value, old, new)
            case "join", [items]:
                return f"({items}|join({value}))"
            case "keys", []:
                return f"({value}|items|map(attribute=0))"
            case "values", []:
                return f"({value}|items|map(attribute=1))"
            case "count", [part]:
                return f"(({value}.split({part})|length) - 1)"
            case "find", [part]:
                parts = f"{value}.split({part})"
                return f"(({parts}[0]|length) if ({parts}|length) > 1 else -1)"
            case "rfind", [part]:
                parts = f"{value}.split({part})"
                return f"(({parts}[:-1]|join({part})|length) if ({parts}|length) > 1 else -1)"
            case "removeprefix", [part]:
                return f"({value}[({part}|length):] if {value}.startswith({part}) else {value})"
            case "removesuffix", [part]:
                return f"({value}[:-({part}|length)] if {value}.endswith({part}) else {value})"
            case "splitlines", []:
                return f"({value}[:-1] if {value}.endswith('\\n') else {value}).split('\\n')"
            case "split", [part, _] if whole[1] == 1:
                parts = f"{value}.split({part})"
                return f"([{parts}[0], {parts}[1:]|join({part})] if ({parts}|length) > 1 else [{value}])"
            case "rsplit", [part, _] if whole[1] == 1:
                parts = f"{value}.split({part})"
                return f"([{parts}[:-1]|join({part}), {parts}[-1]] if ({parts}|length) > 1 else [{value}])"
            case (("startswith" | "endswith"), [_]) if isinstance(arguments[0], nodes.Tuple):
                calls = (f"{value}.{name}({self.part(item, scope)})" for item in arguments[0].items)
                return "(" + " or ".join(calls) + ")"
        raise UnsupportedError(f"the chat template calls the method {name} with {len(given)} arguments, not known")

    def _formatted(self, pattern: Node, call: nodes.Call, scope: Scope) -> str:
        """`'… {} …'.format(…)` of a constant pattern with plain placeholders, as pieces joined."""
        text = pattern.value if isinstance(pattern, nodes.Const) else None
        pieces = _PLACEHOLDER.split(text) if isinstance(text, str) else []
        if not pieces or any("{" in piece or "}" in piece for piece in pieces[::2]):
            raise UnsupportedError("the chat template formats text in a way that onnxruntime-genai cannot")
        self.changes.add("the method `format`")
        named: dict[Node, Node] = {keyword.key: keyword.value for keyword in call.kwargs}
        parts, turn = [quoted(pieces[0])], 0
        for name, after in zip(pieces[1::2], pieces[2::2], strict=True):
            position, turn = (turn, turn + 1) if not name else (int(name) if name.isdigit() else -1, turn)
            value = named.get(name) if position < 0 else call.args[position] if position < len(call.args) else None
            if value is None:
                raise UnsupportedError("the chat template formats text with arguments that are not there")
            parts += [self.part(value, scope), quoted(after)]
        return "(" + " ~ ".join(parts) + ")"


def _replaced(text: str, old: str, new: str) -> str:
    """Returns the expression `text` with `new` in place of every `old`, which are expressions too."""
    return f"({text}.split({old})|join({new}))"
