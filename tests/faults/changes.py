"""Replacements that make a fault: tables of operators, functions and types, and changed constants."""

from __future__ import annotations

import ast
from collections.abc import Iterator

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# The same direction with the other behaviour at equality, and the opposite direction.
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
FUNCTIONS = {
    "any": "all",
    "all": "any",
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "argmin": "argmax",
    "argmax": "argmin",
    "mean": "sum",
    "sum": "mean",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
}
# Functions and methods that can be replaced by their argument, because it has the shape of the result.
TRANSPARENT = {
    "abs",
    "ascontiguousarray",
    "astype",
    "clip",
    "copy",
    "round",
    "sign",
    "sort",
    "sqrt",
    "square",
}
TYPES = {
    "float64": "float32",
    "float32": "float64",
    "float16": "float32",
    "int64": "int8",
    "int32": "int8",
    "int16": "int8",
    "int8": "uint8",
    "uint8": "int8",
    "intp": "int8",
}
# Letter options of LAPACK and array libraries. Single capitals that name an argument in a message are
# excluded: "C" is the Gram matrix.
LETTERS = {"L": "U", "U": "L", "F": "C"}
HARMLESS = {"copy", "check_finite", "overwrite_a", "overwrite_b", "cache", "fastmath"}
# Constants beyond this are tolerances and limits: tests detect a factor of ten, not a small change.
ORDINARY = (1e-3, 1e3)


def stands_alone(text: str, replaced: ast.expr) -> bool:
    """Whether an expression needs no parentheses when it replaces another."""
    if text in ("True", "False", "None"):
        return True
    whole = (ast.Name, ast.Call, ast.Attribute, ast.Subscript)
    node = ast.parse(text, mode="eval").body
    return isinstance(node, whole) or (isinstance(node, ast.Constant) and isinstance(replaced, ast.Constant))


def other_values(value: object) -> tuple[object, ...]:
    """List replacements for a constant; none for None, Ellipsis, and strings other than `LETTERS`."""
    if isinstance(value, str):
        return (LETTERS[value],) if value in LETTERS else ()
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (1,) if value == 0 else (value + 1, value - 1)
    if isinstance(value, float):
        if value == 0:
            return (1.0,)
        factors = (1.01,) if ORDINARY[0] <= abs(value) <= ORDINARY[1] else (10, 0.1)
        return tuple(float(f"{value * factor:.9g}") for factor in factors)
    return ()


def fewer(collection: ast.expr) -> Iterator[ast.expr]:
    """Yield a literal collection with each member removed in turn."""
    if isinstance(collection, ast.Constant) and isinstance(collection.value, str):
        for i in range(len(collection.value)):
            yield ast.Constant(collection.value[:i] + collection.value[i + 1 :])
    elif isinstance(collection, ast.Tuple):
        for i in range(len(collection.elts)):
            yield ast.Tuple(collection.elts[:i] + collection.elts[i + 1 :], ast.Load())


def last_of_equals(argsort: ast.Call) -> ast.expr:
    """Make a stable sort that puts the last of equal values first."""
    values = ast.unparse(argsort.args[0])
    backwards = ast.parse(f"({values})[::-1]", mode="eval").body
    order = ast.unparse(ast.Call(argsort.func, [backwards], argsort.keywords))
    return ast.parse(f"len({values}) - 1 - {order}", mode="eval").body


def is_type_alias(value: ast.expr) -> bool:
    """Whether an assigned value is a type alias, which affects no computation."""
    return isinstance(value, ast.Subscript) and getattr(value.value, "id", "") == "NDArray"
