"""What is rewritten in a template before it is compiled: then the sandbox sees all that takes time."""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer


class Rewriter(NodeTransformer):
    """Puts calls of the sandbox into a template, by names that no template can hide."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Every round is a step."""
        inside = sum(1 for part in node.body for _ in part.find_all(nodes.Node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("step", [nodes.Const(inside)]), lineno=node.lineno))
        return node

    # Their calls are steps, too: but a call does not know how much it runs.
    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """``a ~ b``."""
        self.generic_visit(node)
        return self._call("join", node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """``a < b < c`` is ``a < b and b < c``."""
        self.generic_visit(node)
        made: nodes.Expr | None = None
        left = node.expr
        for operand in node.ops:
            call = self._call("compare", [left, nodes.Const(operand.op), operand.expr])
            made = call if made is None else nodes.And(made, call)
            left = operand.expr
        return node if made is None else made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Slices."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        part = (node.arg.start, node.arg.stop, node.arg.step)
        return self._call("cut", [node.node, *(bound or nodes.Const(None) for bound in part)])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Those that are made, not those that are assigned to."""
        self.generic_visit(node)
        return self._call("held", [node]) if node.ctx == "load" else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Keys of a dict."""
        self.generic_visit(node)
        node.key = self._call("held", [node.key])
        return node

    @staticmethod
    def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class GenerationBlocks(Extension):
    """Accepts ``{% generation %}...{% endgeneration %}``, which marks the model's words for training."""

    tags = {"generation"}  # noqa: RUF012, declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keeps what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
