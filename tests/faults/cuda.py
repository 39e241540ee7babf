"""Find faults for CUDA C++: single changes of the source text, derived from its syntax tree.

These get no faults: preprocessor lines, macro definitions, comments, instructions in `asm`, launch bounds,
and types, including template parameters and arguments, casts and array sizes. A wrong type or size rarely
compiles; larger arrays change nothing; and casts to `size_t` matter only at sizes beyond the memory of any
test. Other faults may fail to compile too; the planter cannot know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import tree_sitter_cuda
from tree_sitter import Language, Node, Parser

from tests.faults.changes import other_values
from tests.faults.fault import MODULE_LEVEL, Fault, named, shown

LANGUAGE = Language(tree_sitter_cuda.language())
PREPROCESSOR_LINE = re.compile(rb"^[ \t]*#(?:.*\\\n)*.*", re.M)
NUMBER = re.compile(r"(?P<integer>0[xX][0-9a-fA-F]+|\d+)[uUlL]*|(?P<float>[\d.]+(?:[eE][+-]?\d+)?)[fF]?")

# Kinds of faults, the parts of the tree they replace, and the replacements.
Changes = Iterator[tuple[str, Node, str]]

# Operators of the same precedence, so that the rest of the expression keeps its meaning.
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "<<": ">>", ">>": "<<"}
# Operators of another precedence.
LOGIC = {"&": "|", "|": "&", "^": "|", "&&": "||", "||": "&&"}
# The same direction with the other behaviour at equality, and the opposite direction.
COMPARISONS = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
}
FUNCTIONS = {"min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf"}
# Expressions that need parentheses inside another expression.
COMPOUND = {"binary_expression", "conditional_expression", "assignment_expression", "comma_expression"}
LEFT_ALONE = {
    "array_declarator",
    "comment",
    "gnu_asm_expression",
    "launch_bounds",
    "parameter_list",
    "static_assert_declaration",
    "template_argument_list",
    "template_parameter_list",
    "type_descriptor",
}


def parse(source: str) -> Node:
    """Parse a file, with its preprocessor lines blanked.

    The grammar does not accept a `#pragma` between a loop and its body.
    """
    return Parser(LANGUAGE).parse(_without_preprocessor(source)).root_node


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
        Each fault makes a file that parses to another syntax tree; some may not compile.
    """
    tree = parse(source)
    code = _without_preprocessor(source)
    for comment in _nodes(tree, "comment"):
        first, last = comment.byte_range
        code = code[:first] + b" " * (last - first) + code[last:]
    planter = _Planter(code, file)
    planter.visit(tree)
    return named(planter.faults)


def _without_preprocessor(source: str) -> bytes:
    def blank(lines: re.Match[bytes]) -> bytes:
        return re.sub(rb"[^\n]", b" ", lines[0])

    return PREPROCESSOR_LINE.sub(blank, source.encode())


def _nodes(node: Node, kind: str) -> Iterator[Node]:
    if node.type == kind:
        yield node
    for child in node.named_children:
        yield from _nodes(child, kind)


def _text(node: Node) -> str:
    assert node.text is not None
    return node.text.decode()


def _lines(node: Node) -> tuple[int, int]:
    return node.start_point[0] + 1, node.end_point[0] + 1


def _grouped(node: Node) -> str:
    return f"({_text(node)})" if node.type in COMPOUND else _text(node)


def _negative(node: Node) -> str:
    text = _grouped(node)
    return f"-({text})" if text.startswith("-") else f"-{text}"


def _field(node: Node, name: str) -> Node:
    found = node.child_by_field_name(name)
    assert found is not None, f"{node.type} without {name}"
    return found


def _other_numbers(literal: str) -> Iterator[str]:
    match = NUMBER.fullmatch(literal)
    if match is None:
        return
    digits = match["integer"] or match["float"]
    suffix = literal[len(digits) :]
    for value in other_values(int(digits, 0) if match["integer"] else float(digits)):
        yield f"{value:#x}{suffix}" if digits[:2] in ("0x", "0X") else f"{value}{suffix}"


class _Planter:
    """Walks a syntax tree and collects faults; its methods are named after types of nodes."""

    def __init__(self, code: bytes, file: str) -> None:
        # Text of the file for display, without comments and preprocessor lines.
        self.code = code
        self.file = file
        self.faults: list[Fault] = []
        self.scope: list[str] = []
        # Span of the current statement, without the statements inside it.
        self.shown = (0, 0)
        # First and last line of the current function.
        self.around: tuple[int, int] | None = None

    def plant(self, node: Node, kind: str, text: str) -> None:
        """Add a fault that replaces a node by a text."""
        first, last = self.shown
        before = self.code[first:last]
        after = self.code[first : node.start_byte] + text.encode() + self.code[node.end_byte : last]
        self.faults.append(
            Fault(
                self.file,
                node.start_point[0] + 1,
                self.around or _lines(node),
                ".".join(self.scope) or MODULE_LEVEL,
                kind,
                shown(before.decode(), after.decode()),
                node.start_byte,
                node.end_byte,
                text,
            )
        )

    def visit(self, node: Node) -> None:
        """Add the faults of a node and of all nodes inside it."""
        macro = node.type == "expression_statement" and not self.scope
        if macro or node.type in LEFT_ALONE:
            return
        outer = self.shown, self.around
        if node.type.endswith(("_statement", "declaration")):
            within = node.child_by_field_name("body") or node.child_by_field_name("consequence")
            self.shown = node.start_byte, within.start_byte if within else node.end_byte
        if node.type == "function_definition":
            self.around = self.around or _lines(node)
        named_here = self.name(node)
        self.scope += named_here
        for kind, part, text in getattr(self, node.type, lambda _: ())(node):
            self.plant(part, kind, text)
        for child in node.named_children:
            self.visit(child)
        del self.scope[len(self.scope) - len(named_here) :]
        self.shown, self.around = outer

    def name(self, node: Node) -> list[str]:
        """Return the parts that a node adds to the qualified names of nodes inside it."""
        if node.type == "function_definition":
            return [_text(_field(next(_nodes(node, "function_declarator")), "declarator"))]
        if node.type in ("struct_specifier", "class_specifier", "namespace_definition"):
            own = node.child_by_field_name("name")
            return [_text(own)] if own else []
        return []

    def expression_statement(self, node: Node) -> Changes:
        if not any(_nodes(node, "gnu_asm_expression")):
            yield "statement", node, ";"

    break_statement = continue_statement = expression_statement

    def comma_expression(self, node: Node) -> Changes:
        left, right = _field(node, "left"), _field(node, "right")
        yield "statement", node, _text(left)
        if left.type != "comma_expression":
            yield "statement", node, _text(right)

    def return_statement(self, node: Node) -> Changes:
        for value in node.named_children:
            yield from self.negated(value)
        if not node.named_children:
            yield "statement", node, ";"

    def init_declarator(self, node: Node) -> Changes:
        value = _field(node, "value")
        yield from self.negated(value)
        # `{}` sets zeros. Replace it by {1}, not by nothing: uninitialized memory may be 0 by chance.
        if _text(value) == "{}":
            yield "constant", value, "{1}"

    def negated(self, value: Node) -> Changes:
        if value.type == "binary_expression" and _text(_field(value, "operator")) in ("*", "/"):
            yield "sign", value, f"-({_text(value)})"

    def assignment_expression(self, node: Node) -> Changes:
        operator, right = _field(node, "operator"), _field(node, "right")
        first = _text(operator)[:-1]
        if first:
            yield "operator", operator, "="
            yield "operator", operator, f"{(OPERATORS | LOGIC)[first]}="
        else:
            yield from self.negated(right)

    def update_expression(self, node: Node) -> Changes:
        operator = _field(node, "operator")
        yield "operator", operator, {"++": "--", "--": "++"}[_text(operator)]

    def forced(self, node: Node, values: tuple[str, ...]) -> Changes:
        condition = node.child_by_field_name("condition")
        while condition and condition.type in ("condition_clause", "parenthesized_expression"):
            condition = condition.named_children[-1]
        if condition and condition.type not in values:
            for value in values:
                yield "condition", condition, value

    def if_statement(self, node: Node) -> Changes:
        yield from self.forced(node, ("true", "false"))

    while_statement = do_statement = if_statement

    def for_statement(self, node: Node) -> Changes:
        # Always true is not planted: the loop would run out of its array, and any test detects that.
        yield from self.forced(node, ("false",))

    def conditional_expression(self, node: Node) -> Changes:
        yield "condition", node, _grouped(_field(node, "consequence"))
        yield "condition", node, _grouped(_field(node, "alternative"))

    def binary_expression(self, node: Node) -> Changes:
        left, right, place = (_field(node, name) for name in ("left", "right", "operator"))
        operator = _text(place)
        if operator in OPERATORS:
            yield "operator", place, OPERATORS[operator]
        if operator in LOGIC:
            kind = "boolean" if operator in ("&&", "||") else "operator"
            yield kind, node, f"({_grouped(left)} {LOGIC[operator]} {_grouped(right)})"
        for other in COMPARISONS.get(operator, ()):
            yield "comparison", place, other
        if operator not in COMPARISONS:
            yield "term", node, _text(left)
        if operator == "-":
            yield "term", node, _negative(right)
        elif operator in ("+", "*", *LOGIC):
            yield "term", node, _text(right)

    def unary_expression(self, node: Node) -> Changes:
        kind = "not" if _text(_field(node, "operator")) == "!" else "sign"
        yield kind, node, _text(_field(node, "argument"))

    def number_literal(self, node: Node) -> Changes:
        for value in _other_numbers(_text(node)):
            yield "constant", node, value

    def true(self, node: Node) -> Changes:
        yield "constant", node, {"true": "false", "false": "true"}[node.type]

    false = true

    def subscript_expression(self, node: Node) -> Changes:
        (index,), array = _field(node, "indices").named_children, _field(node, "argument")
        if index.type != "number_literal":  # number literals are changed as constants
            yield "index", index, f"{_grouped(index)} + 1"
        if array.type == "subscript_expression":
            (outer,) = _field(array, "indices").named_children
            if _text(outer) != _text(index):
                yield "index", node, f"{_text(_field(array, 'argument'))}[{_text(index)}][{_text(outer)}]"

    def call_expression(self, node: Node) -> Changes:
        function, arguments = _field(node, "function"), _field(node, "arguments").named_children
        name = _text(function)
        if name in FUNCTIONS:
            yield "function", function, FUNCTIONS[name]
            for argument in arguments:
                yield "term", node, _grouped(argument)
        elif name.startswith("__shfl"):
            yield "function", node, _grouped(arguments[1])
        elif name == "fmaf":
            a, b, c = (_grouped(argument) for argument in arguments)
            for argument in (arguments[0], arguments[2]):
                if argument.type != "unary_expression":  # signs are changed as operators
                    yield "sign", argument, _negative(argument)
            yield "term", node, f"({a} * {b})"
            yield "term", node, c
            yield "term", node, f"({a} + {c})"
            yield "term", node, f"({b} + {c})"
