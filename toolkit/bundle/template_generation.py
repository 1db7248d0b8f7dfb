"""`{% generation %}`, which marks for training what a model says, and which jinja2 does not know by itself."""

from __future__ import annotations

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationTag(Extension):
    """The tag, whose body has a scope of its own and is put out as it stands."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns the node of the statements up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return self.scoped(body).set_lineno(line)

    def scoped(self, body: list[nodes.Node]) -> nodes.Node:
        """Returns the body with a scope of its own."""
        return nodes.Scope(body)
