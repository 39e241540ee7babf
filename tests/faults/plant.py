"""Find faults for a Python file: single changes of its text, derived from its syntax tree.

These get no faults: docstrings, annotations, imports, decorators, `__all__`, raised errors with their
messages, and keyword arguments that affect only speed or memory. A guard (``if ...: raise``) is never made
always true, because any test would detect that.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.faults.changes import (
    COMPARISONS,
    FUNCTIONS,
    HARMLESS,
    OPERATORS,
    TRANSPARENT,
    TYPES,
    fewer,
    is_type_alias,
    last_of_equals,
    other_values,
    stands_alone,
)
from tests.faults.fault import MODULE_LEVEL, Fault, named, shown

# Kinds of faults, and the replacement of an expression.
Changes = Iterator[tuple[str, ast.AST | str]]


def find_faults(source: str, file: str) -> list[Fault]:
    """Find every fault of a file, in the order of its lines.

    Parameters
    ----------
    source : str
        Text of the file.
    file : str
        Its path, stored in the faults.

    Returns
    -------
    list of Fault
        Each fault makes a file that parses to another syntax tree.
    """
    planter = _Planter(source, file)
    planter.body(ast.parse(source).body)
    return named(planter.faults)


def _without_comments(text: bytes) -> str:
    return re.sub("  #.*", "", text.decode())


class _Planter:
    """Walks a syntax tree and collects faults."""

    def __init__(self, source: str, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.scope: list[str] = []
        self.assigned: set[str] = set()
        # First and last line of the current outermost function.
        self.around: tuple[int, int] | None = None
        self.data = source.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        # Span of the current statement, without the statements inside it.
        self.shown = (0, 0)

    def plant(self, node: ast.expr | ast.stmt, kind: str, after: ast.AST | str) -> None:
        """Add a fault that replaces a node by `after`."""
        text = after if isinstance(after, str) else ast.unparse(after)
        if isinstance(node, ast.expr) and not stands_alone(text, node):
            text = f"({text})"
        start, end = self.span(node)
        if isinstance(node, ast.expr) and text.strip("()") == self.data[start:end].decode().strip("()"):
            return
        first, last = self.shown
        self.faults.append(
            Fault(
                self.file,
                node.lineno,
                self.around or (node.lineno, node.end_lineno or node.lineno),
                ".".join(self.scope) or MODULE_LEVEL,
                kind,
                shown(
                    _without_comments(self.data[first:last]),
                    _without_comments(self.data[first:start] + text.encode() + self.data[end:last]),
                ),
                start,
                end,
                text,
            )
        )

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Return the range of bytes of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.lines[node.lineno - 1] + node.col_offset,
            self.lines[node.end_lineno - 1] + node.end_col_offset,
        )

    def body(self, statements: list[ast.stmt]) -> None:
        """Add the faults of a block of statements."""
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            start, end = self.span(statement)
            within = getattr(statement, "body", None)
            self.shown = start, self.span(within[0])[0] if within else end
            getattr(self, f"statement_{type(statement).__name__}", self.statement)(statement)

    def statement(self, node: ast.stmt) -> None:
        """Add the faults of any other statement: of its expressions, and of the statements inside it."""
        for name, value in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody"):
                self.body(value)
            elif name == "handlers":
                for handler in value:
                    self.body(handler.body)
            elif name != "annotation":
                for part in value if isinstance(value, list) else [value]:
                    self.inside(part)

    def statement_Import(self, node: ast.stmt) -> None:
        """Add nothing: missing names are always detected, and error messages are not behaviour."""

    statement_ImportFrom = statement_Raise = statement_Delete = statement_Assert = statement_Import

    def statement_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        outermost = self.around is None
        self.around = self.around or (node.lineno, node.end_lineno or node.lineno)
        self.scope.append(node.name)
        for default in (*arguments.defaults, *arguments.kw_defaults):
            self.inside(default)
        outer, self.assigned = self.assigned, {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
        self.body(node.body)
        self.assigned = outer
        self.scope.pop()
        if outermost:
            self.around = None

    def statement_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.body(node.body)
        self.scope.pop()

    def statement_Expr(self, node: ast.Expr) -> None:
        self.plant(node, "statement", "pass")
        self.inside(node.value)

    statement_Break = statement_Continue = lambda self, node: self.plant(node, "statement", "pass")

    def statement_Assign(self, node: ast.Assign) -> None:
        names = {
            part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)
        }
        stored = any(isinstance(p, ast.Subscript | ast.Attribute) for t in node.targets for p in ast.walk(t))
        if "__all__" in names or is_type_alias(node.value):
            return
        # Removing the first assignment of a name would always be detected.
        if stored or (names <= self.assigned and self.scope):
            self.plant(node, "statement", "pass")
        self.assigned |= names
        self.negated(node.value)
        for part in (*node.targets, node.value):
            self.inside(part)

    def statement_AugAssign(self, node: ast.AugAssign) -> None:
        self.plant(node, "statement", "pass")
        self.plant(node, "operator", ast.Assign([node.target], node.value, lineno=node.lineno))
        if type(node.op) in OPERATORS:
            self.plant(node, "operator", ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value))
        self.inside(node.target)
        self.inside(node.value)

    def statement_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self.negated(node.value)
            self.inside(node.value)

    def statement_If(self, node: ast.If) -> None:
        guard = isinstance(node.body[-1], ast.Raise) and not node.orelse
        self.forced(node.test, (False,) if guard else (True, False))
        self.statement(node)

    def statement_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self.forced(node.test, (True, False))
            self.statement(node)
        else:
            self.body(node.body)

    def inside(self, node: object) -> None:
        """Add the faults of an expression and of all expressions inside it."""
        if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.keyword):
            if node.arg in HARMLESS:
                return
            if node.arg == "axis":
                self.axis(node.value)
                return
        for change in getattr(self, f"expression_{type(node).__name__}", lambda _: ())(node):
            self.plant(node, *change)  # type: ignore[arg-type]
        for part in ast.iter_child_nodes(node):
            self.inside(part)

    def forced(self, test: ast.expr, values: tuple[bool, ...]) -> None:
        for value in values:
            self.plant(test, "condition", repr(value))

    def negated(self, value: ast.expr) -> None:
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult | ast.Div | ast.MatMult):
            self.plant(value, "sign", ast.UnaryOp(ast.USub(), value))

    def expression_BinOp(self, node: ast.BinOp) -> Changes:
        if type(node.op) in OPERATORS:
            yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, ast.MatMult):
            yield "operator", ast.BinOp(node.right, node.op, node.left)
        yield "term", node.left
        if isinstance(node.op, ast.Sub):
            yield "term", ast.UnaryOp(ast.USub(), node.right)
        elif not isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod | ast.Pow):
            yield "term", node.right

    def expression_UnaryOp(self, node: ast.UnaryOp) -> Changes:
        yield ("sign" if isinstance(node.op, ast.USub) else "not"), node.operand

    def expression_BoolOp(self, node: ast.BoolOp) -> Changes:
        yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for dropped in range(len(node.values)):
            rest = [value for place, value in enumerate(node.values) if place != dropped]
            yield "term", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)

    def expression_Compare(self, node: ast.Compare) -> Changes:
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                ops = [other() if i == place else op for i, op in enumerate(node.ops)]
                yield "comparison", ast.Compare(node.left, ops, node.comparators)
        last = node.comparators[-1]
        if isinstance(node.ops[-1], ast.In | ast.NotIn):
            for shorter in fewer(last):
                yield "term", ast.Compare(node.left, node.ops, [*node.comparators[:-1], shorter])

    def expression_IfExp(self, node: ast.IfExp) -> Changes:
        yield "condition", node.body
        yield "condition", node.orelse

    def expression_comprehension(self, node: ast.comprehension) -> Changes:
        for test in node.ifs:
            self.forced(test, (True, False))
        yield from ()

    def expression_Constant(self, node: ast.Constant) -> Changes:
        for value in other_values(node.value):
            yield "constant", repr(value)

    def expression_Attribute(self, node: ast.Attribute) -> Changes:
        if node.attr == "T":
            yield "transpose", node.value
        elif node.attr in TYPES and isinstance(node.value, ast.Name):
            yield "type", ast.Attribute(node.value, TYPES[node.attr], node.ctx)

    def expression_Subscript(self, node: ast.Subscript) -> Changes:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if isinstance(part, ast.Slice):
                self.bounds(part)
            elif isinstance(part, ast.Name | ast.BinOp):
                self.moved(part, (1,))
        if len(parts) == 2 and not any(isinstance(part, ast.Slice) for part in parts):
            yield "index", ast.Subscript(node.value, ast.Tuple(parts[::-1], ast.Load()), node.ctx)

    def bounds(self, node: ast.Slice) -> None:
        for bound, steps in ((node.lower, (1,)), (node.upper, (1, -1)), (node.step, (1,))):
            if bound is not None:
                self.moved(bound, steps)
        if node.lower is not None and getattr(node.lower, "value", None) != 0:
            self.plant(node.lower, "index", "None")
        if node.upper is not None:
            self.plant(node.upper, "index", "None")

    def moved(self, bound: ast.expr, steps: tuple[int, ...]) -> None:
        if not isinstance(bound, ast.Constant):  # constants are changed in expression_Constant
            for step in steps:
                operator = ast.Add() if step > 0 else ast.Sub()
                self.plant(bound, "index", ast.BinOp(bound, operator, ast.Constant(1)))

    def expression_Call(self, node: ast.Call) -> Changes:
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            if name in FUNCTIONS:
                yield "function", ast.Call(ast.Attribute(owner, FUNCTIONS[name]), node.args, node.keywords)
            if name in TRANSPARENT:
                yield "function", node.args[0] if getattr(owner, "id", "") in ("np", "xp") else owner
        else:
            name = getattr(node.func, "id", "")
            if name in ("any", "all", "min", "max"):
                yield "function", ast.Call(ast.Name(FUNCTIONS[name]), node.args, node.keywords)
            if name in TRANSPARENT:
                yield "function", node.args[0]
        if name in ("minimum", "maximum", "min", "max") and len(node.args) == 2:
            yield "term", node.args[0]
            yield "term", node.args[1]
        if name == "where" and len(node.args) == 3:
            yield "condition", ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
            yield "condition", node.args[1]
            yield "condition", node.args[2]
        if name == "ix_":
            yield "index", ast.Call(node.func, node.args[::-1], [])
        if name == "range":
            for place, argument in enumerate(node.args):
                self.moved(argument, (1, -1) if place == min(1, len(node.args) - 1) else (1,))
        if name == "argsort" and isinstance(keywords.get("kind"), ast.Constant):
            yield "tie", last_of_equals(node)
        if "dtype" in keywords:
            rest = [keyword for keyword in node.keywords if keyword.arg != "dtype"]
            yield "type", ast.Call(node.func, node.args, rest)

    def axis(self, value: ast.expr) -> None:
        first = isinstance(value, ast.Constant) and value.value == 0
        self.plant(value, "axis", "1" if first else "0")
