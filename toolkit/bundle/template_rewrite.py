"""A chat template written anew so that onnxruntime-genai's engine renders what jinja2 renders from the original.

jinja2 parses the original, as transformers sets it up; what is written back has no white space that a setting could
change, names that do not clash, and only what the engine knows. Nothing of the template is run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols

from toolkit.bundle.template_calls import EngineExpressions
from toolkit.bundle.template_expressions import MAX_CHARACTERS, Node, quoted
from toolkit.bundle.template_generation import GenerationTag
from toolkit.bundle.template_names import Names, Scope
from toolkit.errors import UnsupportedError

_TAGS: Final = ("{{", "{%", "{#")
_WHITE_SPACE: Final = "white space around blocks (trim_blocks, lstrip_blocks)"


@dataclass(frozen=True)
class Rewritten:
    """A template for onnxruntime-genai, and what in it is written in another way than in the original."""

    text: str
    changes: tuple[str, ...]


def rewrite(source: str, special_tokens: Mapping[str, str | Sequence[str]], exact: bool = False) -> Rewritten:
    """`source` for onnxruntime-genai. `special_tokens` are those that the engine does not know by itself.

    `exact` keeps apart none and undefined, true and empty, at the price of a longer text. Raises UnsupportedError for
    a template that jinja2 cannot parse, or with what has no equivalent in the engine.
    """
    if len(source) > MAX_CHARACTERS:
        raise UnsupportedError(f"the chat template has {len(source)} characters, expected at most {MAX_CHARACTERS}")
    try:
        template = _parsed(source, True)
        names = Names(template)
        writer = _Statements(names, exact)
        text = writer.body(template.body, names.root)
        if template != _parsed(source, False):
            writer.expressions.changes.add(_WHITE_SPACE)
    except jinja2.TemplateSyntaxError as problem:
        raise UnsupportedError(f"the chat template is none of jinja2's: {problem}") from None
    except RecursionError:
        raise UnsupportedError("the chat template is nested too deeply") from None
    begin = ""
    if "tools" in names.used:
        # Releases that read tools in a form of their own leave them as they are where they find these words.
        begin += "{# tool.function #}"
    for name in sorted(names.used & {"tools", "documents"}):
        begin += f"{{% if {name} is not defined %}}{{% set {name} = None %}}{{% endif %}}"
    for name in sorted(names.used & set(special_tokens)):
        writer.expressions.changes.add(f"{name} is named in the template")
        given = special_tokens[name]
        value = quoted(given) if isinstance(given, str) else f"[{', '.join(map(quoted, given))}]"
        begin += f"{{% set {name} = {value} %}}"
    return Rewritten(begin + _whole_end(text), tuple(sorted(writer.expressions.changes)))


def _parsed(source: str, blocks: bool) -> nodes.Template:
    environment = jinja2.Environment(
        trim_blocks=blocks, lstrip_blocks=blocks, extensions=[GenerationTag, loopcontrols], autoescape=False
    )
    return environment.parse(source)


def _whole_end(text: str) -> str:
    """The engine drops a line end at the end of a template."""
    return text[:-1] + "{{ '\\n' }}" if text.endswith("\n") else text


class _Statements:
    """Writes the statements of one template."""

    def __init__(self, names: Names, exact: bool) -> None:
        self._names = names
        self.expressions = EngineExpressions(names, exact)

    def body(self, statements: list[nodes.Node], scope: Scope) -> str:
        """The text of statements in a row."""
        written: list[str] = []
        for node in statements:
            writer = getattr(self, f"_{type(node).__name__.lower()}", None)
            if writer is None:
                raise UnsupportedError(
                    f"the chat template has a {type(node).__name__} block, which onnxruntime-genai does not know"
                )
            text: str = writer(node, scope)
            prelude, self.expressions.prelude = "".join(self.expressions.prelude), []
            written.append(prelude + text)
        text = "".join(written)
        if len(text) > MAX_CHARACTERS:
            raise UnsupportedError("the chat template grows beyond 1 MiB where it is written for onnxruntime-genai")
        return text

    def _output(self, node: nodes.Output, scope: Scope) -> str:
        written = []
        for number, part in enumerate(node.nodes):
            if not isinstance(part, nodes.TemplateData):
                written.append(f"{{{{ {self.expressions.shown(part, scope)} }}}}")
            elif any(tag in part.data for tag in _TAGS) or part.data.endswith("{") or "\r" in part.data:
                written.append(f"{{{{ {quoted(part.data)} }}}}")
            else:
                written.append(part.data)
            if number < len(node.nodes) - 1 and not written[-1]:
                written.pop()
        return "".join(written)

    def _if(self, node: Node, scope: Scope) -> str:
        text = f"{{% if {self.expressions.condition(node.test, scope)} %}}"
        prelude, self.expressions.prelude = "".join(self.expressions.prelude), []
        text += self.body(node.body, scope)
        ends = ""
        for branch in node.elif_:
            condition = self.expressions.condition(branch.test, scope)
            before, self.expressions.prelude = "".join(self.expressions.prelude), []
            if before:
                text, ends = text + f"{{% else %}}{before}{{% if {condition} %}}", ends + "{% endif %}"
            else:
                text += f"{{% elif {condition} %}}"
            text += self.body(branch.body, scope)
        if node.else_:
            text += "{% else %}" + self.body(node.else_, scope)
        self.expressions.prelude = [prelude] if prelude else []
        return text + "{% endif %}" + ends

    def _for(self, node: Node, scope: Scope) -> str:
        if node.recursive:
            raise UnsupportedError("the chat template has a recursive loop, which onnxruntime-genai does not know")
        inner = self._names.scopes[id(node)]
        whole = self.expressions.part(node.iter, scope)
        prelude, self.expressions.prelude = self.expressions.prelude, []
        condition = f" if {self.expressions.condition(node.test, inner)}" if node.test is not None else ""
        if self.expressions.prelude:
            raise UnsupportedError("the chat template filters a list in a loop's condition, which is not known")
        text = f"{{% for {self._target(node.target, inner)} in {whole}{condition} %}}{self._resets(inner)}"
        text += self.body(node.body, inner)
        if node.else_:
            text += "{% else %}" + self.body(node.else_, self._names.scopes[id(node.else_)])
        self.expressions.prelude = prelude
        return text + "{% endfor %}"

    def _target(self, node: Node, scope: Scope) -> str:
        if isinstance(node, nodes.Tuple):
            return ", ".join(self._target(item, scope) for item in node.items)
        return self.expressions.write(node, scope)

    def _resets(self, scope: Scope) -> str:
        """Returns statements that set a body's variables, in each iteration and each call, as they were before it."""
        text = ""
        for name in sorted(scope.resets):
            given = scope.declared[name]
            above = scope.above.name_of(name) if scope.above else name
            self.expressions.changes.add("variables of a loop's body begin anew in each iteration")
            text += f"{{% set {given} = {above if above != given else self._names.undefined} %}}"
        return text

    def _assign(self, node: Node, scope: Scope) -> str:
        return f"{{% set {self._target(node.target, scope)} = {self.expressions.write(node.node, scope)} %}}"

    def _assignblock(self, node: nodes.AssignBlock, scope: Scope) -> str:
        inner, target = self._names.scopes[id(node)], self._target(node.target, scope)
        given = self._names.unused("block") if "." in target else target
        text = f"{{% set {given} %}}{self._resets(inner)}{self.body(node.body, inner)}{{% endset %}}"
        if node.filter is not None:
            value = _filled(node.filter, nodes.Name(given, "load"))
            text += f"{{% set {given} = {self.expressions.write(value, _Given(scope, given))} %}}"
        return text + (f"{{% set {target} = {given} %}}" if given != target else "")

    def _filterblock(self, node: nodes.FilterBlock, scope: Scope) -> str:
        inner, given = self._names.scopes[id(node)], self._names.unused("block")
        value = _filled(node.filter, nodes.Name(given, "load"))
        text = f"{{% set {given} %}}{self._resets(inner)}{self.body(node.body, inner)}{{% endset %}}"
        return text + f"{{{{ {self.expressions.write(value, _Given(scope, given))} }}}}"

    def _macro(self, node: nodes.Macro, scope: Scope) -> str:
        inner, given = self._names.scopes[id(node)], []
        names, renamed = {argument.name for argument in node.args}, self._names.parameters[node.name]
        for name in ("varargs", "kwargs", "caller"):
            if name not in names and any(found.name == name for found in node.find_all(nodes.Name)):
                raise UnsupportedError(f"the chat template's macro {node.name} uses {name}, which is not known")
        defaults = [None] * (len(node.args) - len(node.defaults)) + list(node.defaults)
        for argument, default in zip(node.args, defaults, strict=True):
            value = self._names.undefined if default is None else self.expressions.part(default, scope)
            given.append(f"{renamed[argument.name]}={value}")
        copies = "".join(
            f"{{% set {inner.declared[argument.name]} = {renamed[argument.name]} %}}"
            for argument in node.args
            if inner.declared[argument.name] != renamed[argument.name]
        )
        begin, end = "", ""
        if node.name in self._names.recursive:
            self.expressions.changes.add("a macro that calls itself keeps its variables")
            once = self._names.unused("once")
            begin, end = f"{{% for {once} in [0] %}}", "{% endfor %}"
        text = f"{begin}{copies}{self._resets(inner)}{self.body(node.body, inner)}{end}"
        return f"{{% macro {scope.name_of(node.name)}({', '.join(given)}) %}}{text}{{% endmacro %}}"

    def _with(self, node: Node, scope: Scope) -> str:
        inner = self._names.scopes[id(node)]
        text = ""
        for target, value in zip(node.targets, node.values, strict=True):
            text += f"{{% set {self._target(target, inner)} = {self.expressions.write(value, scope)} %}}"
        return text + self._resets(inner) + self.body(node.body, inner)

    def _scope(self, node: nodes.Scope, scope: Scope) -> str:
        inner = self._names.scopes[id(node)]
        return self._resets(inner) + self.body(node.body, inner)

    def _break(self, node: nodes.Node, scope: Scope) -> str:
        return "{% break %}"

    def _continue(self, node: nodes.Node, scope: Scope) -> str:
        return "{% continue %}"


class _Given(Scope):
    """A scope in which one name stands for itself."""

    def __init__(self, above: Scope, name: str) -> None:
        super().__init__(above, declared={name: name})


def _filled(node: Node, value: nodes.Expr) -> Node:
    """A chain of filters with the value that its first one has none of."""
    if isinstance(node, nodes.Filter):
        inner = value if node.node is None else _filled(node.node, value)
        return nodes.Filter(inner, node.name, node.args, node.kwargs, node.dyn_args, node.dyn_kwargs)
    return node
