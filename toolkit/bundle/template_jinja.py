"""A chat template rendered by jinja2 as transformers sets it up: the measure for every other engine.

The sandbox keeps a template from Python's insides; time and memory are bounded by the process that calls this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.bundle.template_generation import GenerationTag

Message = Mapping[str, Any]
_MAX_PRODUCT: Final = 1 << 24
_MAX_EXPONENT: Final = 64


class _CalledGeneration(GenerationTag):
    """The same with its body as a block that is called, so that variables in it are its own."""

    def scoped(self, body: list[nodes.Node]) -> nodes.Node:
        """Returns the body as a block that is called."""
        return nodes.CallBlock(self.call_method("_said"), [], [], body)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, in which a product of texts or lists has a bound too."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result; raises jinja2.TemplateError for one that is larger than any prompt."""
        pair = (left, right) if isinstance(right, int) else (right, left)
        sized = isinstance(pair[0], str | list | tuple) and isinstance(pair[1], int) and operator == "*"
        if (sized and len(pair[0]) * pair[1] > _MAX_PRODUCT) or (operator == "**" and abs(right) > _MAX_EXPONENT):
            raise jinja2.TemplateError("the template asks for a product beyond all bounds")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> jinja2.Template:
    """Compiles a template in the environment that transformers renders it in. Raises jinja2.TemplateError for a text
    that is no template."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_CalledGeneration, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def render(
    template: jinja2.Template,
    messages: list[Message],
    special_tokens: Mapping[str, str | Sequence[str]],
    tools: list[Message] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """One prompt, as `apply_chat_template` of transformers makes it. Raises whatever the template does."""
    return template.render(
        {**special_tokens}, messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
    )


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
