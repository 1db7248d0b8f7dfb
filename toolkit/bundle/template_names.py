"""Names in a chat template, as jinja2 scopes them, given so that onnxruntime-genai's engine sees the same variables.

In jinja2 a loop's body, a macro and a block set have variables of their own, anew in each iteration. In genai's engine
a loop keeps what an earlier iteration has set, its target stays behind in the scope around it, and a macro's parameters
are variables of the template. Distinct names, and a reset at the beginning of a body, make up for all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from jinja2 import nodes

# Filters and functions of genai's engine are variables, which a template's own of that name would hide.
ENGINE_NAMES: Final = frozenset(
    "raise_exception tojson items last trim lower default e escape joiner count dictsort join namespace equalto length "
    "safe string int list unique select reject map indent selectattr rejectattr range strftime_now first upper sort "
    "reverse replace abs float round sum min max d title capitalize loop none true false null".split()
)
# What transformers passes to every template, whether or not there are any.
INPUTS: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
SCOPED: Final = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.With, nodes.Scope)


@dataclass
class Scope:
    """One scope of a template: what is declared in it, the names given to that, and what is read before it is set."""

    above: Scope | None
    is_macro: bool = False
    declared: dict[str, str] = field(default_factory=dict)
    resets: set[str] = field(default_factory=set)

    def find(self, name: str) -> Scope | None:
        """The nearest scope that declares a name; None for what comes from outside the template."""
        scope: Scope | None = self
        while scope is not None and name not in scope.declared:
            scope = scope.above
        return scope

    def name_of(self, name: str) -> str:
        """What a name of the template is called in the rewritten one."""
        found = self.find(name)
        return found.declared[name] if found else name


class Names:
    """Every scope of a template by the node that opens it, with a name for each variable that clashes with no other.

    `used` are all names of the template.
    """

    def __init__(self, template: nodes.Template) -> None:
        self.scopes: dict[int, Scope] = {}
        self.macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        self.root = Scope(None)
        self._uses: dict[str, set[int]] = {}
        self._taken = set(ENGINE_NAMES)
        self._open(template, self.root, template.body, set())
        self._count(template, self.root)
        self.used = set(self._uses)
        self._taken |= self.used
        self._rename()
        self.undefined = self.unused("undefined")
        self.recursive = _recursive(self.macros)
        self.parameters = {name: self._parameters(macro) for name, macro in self.macros.items()}

    def unused(self, name: str) -> str:
        """A name like `name` that stands nowhere else in the template."""
        number = 1
        while (given := name if number == 1 else f"{name}_{number}") in self._taken:
            number += 1
        self._taken.add(given)
        return given

    def _parameters(self, macro: nodes.Macro) -> dict[str, str]:
        """What a macro's parameters are called: as in its body, unless that has to keep its own from further calls."""
        local = self.scopes[id(macro)].declared
        kept = macro.name in self.recursive
        return {a.name: self.unused(f"{a.name}_given") if kept else local[a.name] for a in macro.args}

    def _open(self, node: nodes.Node, scope: Scope, body: list[nodes.Node], targets: set[str]) -> None:
        self.scopes[id(node)] = scope
        for name in sorted(targets):
            scope.declared[name] = name
        for name in _stored(body):
            scope.declared.setdefault(name, name)
        if scope.above is not None:
            scope.resets = (set(scope.declared) - targets) & _read_early(body, set())
        for child in body:
            self._descend(child, scope)

    def _descend(self, node: nodes.Node, scope: Scope) -> None:
        if isinstance(node, nodes.For):
            self._open(node, Scope(scope), node.body, set(_stored([node.target])))
            self._open_else(node, scope)
        elif isinstance(node, nodes.Macro):
            self._open(node, Scope(scope, is_macro=True), node.body, {argument.name for argument in node.args})
        elif isinstance(node, nodes.With):
            targets = {name for target in node.targets for name in _stored([target])}
            self._open(node, Scope(scope), node.body, targets)
        elif isinstance(node, SCOPED):
            self._open(node, Scope(scope), list(getattr(node, "body", [])), set())
        else:
            for child in node.iter_child_nodes():
                self._descend(child, scope)

    def _open_else(self, node: nodes.For, scope: Scope) -> None:
        """The branch for no items is a scope beside the body's, known by its list of nodes."""
        beside = Scope(scope)
        self.scopes[id(node.else_)] = beside
        for name in _stored(node.else_):
            beside.declared.setdefault(name, name)
        for child in node.else_:
            self._descend(child, beside)

    def _count(self, node: nodes.Node, scope: Scope) -> None:
        """Notes in which scope each use of a name finds it."""
        if isinstance(node, nodes.Name):
            found = scope.find(node.name)
            self._uses.setdefault(node.name, set()).add(id(found))
            return
        inner = self.scopes.get(id(node), scope)
        for child in node.iter_child_nodes():
            if isinstance(node, nodes.For) and _is_one_of(child, node.else_):
                self._count(child, self.scopes[id(node.else_)])
            else:
                self._count(child, scope if _is_outer(node, child) else inner)
        if isinstance(node, nodes.Macro):
            self._uses.setdefault(node.name, set()).add(id(scope.find(node.name)))

    def _rename(self) -> None:
        for scope in self.scopes.values():
            for name in scope.declared:
                above = scope.above.find(name) if scope.above else None
                elsewhere = self._uses.get(name, set()) - {id(scope)}
                clashes = above is not None or (scope.above is not None and id(None) in elsewhere)
                clashes |= name in INPUTS or id(self.root) in elsewhere or (scope.is_macro and bool(elsewhere))
                if name in ENGINE_NAMES or (clashes and scope.above is not None):
                    scope.declared[name] = self.unused(name)


def _is_outer(node: nodes.Node, child: nodes.Node) -> bool:
    """Whether a part of a node that opens a scope is evaluated in the scope around it."""
    if isinstance(node, nodes.For):
        return child is node.iter
    if isinstance(node, nodes.Macro):
        return _is_one_of(child, node.defaults)
    if isinstance(node, nodes.With):
        return _is_one_of(child, node.values)
    if isinstance(node, nodes.AssignBlock):
        return child is node.target
    return False


def _is_one_of(child: nodes.Node, parts: Sequence[nodes.Node]) -> bool:
    """Returns whether one of `parts` is this very node; by `==` nodes that look alike would be equal."""
    return any(child is part for part in parts)


def _stored(body: list[nodes.Node]) -> Iterator[str]:
    """The names that statements set in their own scope, not those of scopes within."""
    for node in body:
        if isinstance(node, nodes.Name):
            if node.ctx == "store":
                yield node.name
        elif isinstance(node, nodes.AssignBlock):
            yield from _stored([node.target])
        elif isinstance(node, nodes.Macro):
            yield node.name
        elif not isinstance(node, SCOPED):
            yield from _stored(list(node.iter_child_nodes()))


def _read_early(body: Sequence[nodes.Node], certain: set[str]) -> set[str]:
    """The names that a body may read before it has set them; `certain` holds those that are set, and grows."""
    early = set[str]()
    for node in body:
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            early |= _names_in(node.node) - certain
            certain.add(node.target.name)
        elif isinstance(node, nodes.If):
            ends = []
            for test, branch in [*((part.test, part.body) for part in (node, *node.elif_)), (None, node.else_)]:
                end = set(certain)
                early |= (_names_in(test) - certain if test is not None else set()) | _read_early(branch, end)
                ends.append(end)
            certain |= set.intersection(*ends)
        else:
            early |= _names_in(node) - certain
            certain |= {node.name} if isinstance(node, nodes.Macro) else set()
    return early


def _names_in(node: nodes.Node) -> set[str]:
    own = {node.name} if isinstance(node, nodes.Name) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _recursive(macros: Mapping[str, nodes.Macro]) -> set[str]:
    """The macros that call themselves in the end."""
    calls = {name: {n.name for n in macro.find_all(nodes.Name)} & set(macros) for name, macro in macros.items()}
    found = set()
    for name in macros:
        seen, todo = set[str](), [*calls[name]]
        while todo:
            if (following := todo.pop()) not in seen:
                seen.add(following)
                todo += calls[following]
        if name in seen:
            found.add(name)
    return found
