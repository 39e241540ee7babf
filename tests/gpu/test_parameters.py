"""Structs of parameters: their layout against C++, the bytes of one, and what is refused."""

import ctypes
import re

import numpy as np
import pytest

from gpu.device import STANDIN, xp
from gpu.kernels import arrange, decode, dense, prefill, warpgroup
from gpu.kernels.parameters import MATRIX, Int, Pointer, Struct, matrix
from gpu.kernels.sources import INSTRUCTIONS, SHARED_BY_ALL
from tests.gpu.emulation import COMPILER, Emulator
from tests.gpu.ternary_cases import coded_case, lay_out, random_case

SOURCES = [module.SOURCE for module in (arrange, decode, prefill, warpgroup, dense)]
OUTER = Struct(
    "Outer",
    first=Int(),
    x=Pointer("float16", "uint16"),
    inner=Struct("Inner", sums=Pointer("float32", optional=True), ends=Int(3)),
    last=Int(),
)


class Inner(ctypes.Structure):
    _fields_ = (("sums", ctypes.c_void_p), ("ends", ctypes.c_int * 3))


class Outer(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int), ("x", ctypes.c_void_p), ("inner", Inner), ("last", ctypes.c_int))


def values(**changes):
    inner = {"sums": None, "ends": (7, 8, 9)}
    return {"first": 1, "x": xp.zeros(3, np.float16), "inner": inner, "last": -5} | changes


def test_the_layout_is_that_of_c():
    assert OUTER.dtype.itemsize == ctypes.sizeof(Outer)
    for field, (_, offset) in OUTER.dtype.fields.items():
        assert offset == getattr(Outer, field).offset
        assert OUTER.fields[field].dtype.itemsize == getattr(Outer, field).size


def test_the_bytes_of_a_struct():
    sums = xp.zeros(2, np.float32)
    given = values(inner={"sums": sums, "ends": (7, 8, 9)})
    packed = OUTER.of(**given).packed(lambda array: {id(given["x"]): 2**40, id(sums): 4096}[id(array)])
    assert packed.shape == ()  # CuPy passes arrays of size one by value
    found = Outer.from_buffer_copy(packed.tobytes())
    assert (found.first, found.x, found.inner.sums, found.last) == (1, 2**40, 4096, -5)
    assert list(found.inner.ends) == [7, 8, 9]
    null = OUTER.of(**values()).packed(lambda array: 64)
    assert Outer.from_buffer_copy(null.tobytes()).inner.sums is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, TypeError, r"Outer\.x must be an array"),
        ({"x": [1.0]}, TypeError, r"Outer\.x must be an array of .* got list"),
        ({"x": xp.zeros(3, np.float32)}, TypeError, r"Outer\.x must be float16 or uint16, got float32"),
        ({"x": xp.zeros((4, 4), np.float16)[:, ::2]}, ValueError, r"Outer\.x must be contiguous"),
        ({"first": 1.0}, TypeError, r"Outer\.first takes 1 int"),
        ({"first": True}, TypeError, r"Outer\.first takes 1 int"),
        ({"first": np.int64(3)}, TypeError, r"Outer\.first takes 1 int"),
        ({"first": 2**31}, ValueError, r"Outer\.first does not fit"),
        ({"last": -(2**31) - 1}, ValueError, r"Outer\.last does not fit"),
        ({"inner": {"sums": None, "ends": (1, 2)}}, TypeError, r"Inner\.ends takes 3 int"),
        (
            {"inner": {"sums": xp.zeros(2, np.float16), "ends": (1, 2, 3)}},
            TypeError,
            r"Inner\.sums must be float32, got float16",
        ),
        ({"inner": {"sums": None}}, TypeError, "Inner has the fields sums, ends, got sums"),
        ({"other": 1}, TypeError, "Outer has the fields"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        OUTER.of(**values(**changes))


def test_the_ends_of_an_int_are_taken():
    packed = OUTER.of(**values(first=2**31 - 1, last=-(2**31))).packed(lambda array: 0)
    assert (packed["first"], packed["last"]) == (2**31 - 1, -(2**31))


def test_parameters_of_a_matrix():
    layout = lay_out(random_case(40, 300, 128), random_case(3, 300, 128))
    found = matrix(layout)
    assert found["words"] is layout.words
    assert (found["m"], found["pairs_shift"], found["ends"]) == (300, 1, (40, 43, 43))
    assert found["row_factors"] is found["block_factors"] is None
    coded = lay_out(coded_case(40, 300, 64))
    assert matrix(coded)["row_factors"] is coded.row_factors
    assert matrix(coded)["pairs_shift"] == 2


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.file)
def test_constants_are_stated_once(source):
    """In Python, and nowhere in the files: what is declared twice would not compile."""
    text = source.text([])
    for name, value in (SHARED_BY_ALL | source.constants).items():
        assert re.findall(rf"\bint {name} = (\w+)", text) == [str(value)], name
    assert text.startswith(f'#line 1 "{INSTRUCTIONS}"')
    one, *others = source.kernels.values()
    assert all(macro in source.text().splitlines() for macro in (one, *others))
    some = source.text([next(iter(source.kernels))]).splitlines()
    assert one in some
    assert not {*others} & {*some}
    assert source.text([], "// other").startswith("// other\n#line")


@pytest.mark.skipif(not STANDIN or COMPILER is None, reason="sources are changed for the emulator only")
@pytest.mark.parametrize(
    "edit",
    [
        ("int n, splits;", "int splits, n;"),
        ("int n, splits;", "int n, splits, more;"),
        ("int n, splits;", "short n, splits;"),
        ("int m, pairs_shift;", "int pairs_shift, m;"),
    ],
    ids=["order", "size", "type", "matrix"],
)
def test_another_declaration_does_not_compile(edit, tmp_path, capfd):
    assert MATRIX.fields.keys() >= {"m", "pairs_shift"}
    sums, y = xp.zeros((1, 1, 1), np.float32), xp.zeros((1, 1), np.float16)
    arguments = warpgroup.COMBINE.of(sums=sums, y=y, n=1, splits=1)
    launch = (warpgroup.SOURCE, "combine_float16", (1, 1), 256, 0, arguments)
    Emulator(tmp_path)(*launch)
    with pytest.raises(SyntaxError):
        Emulator(tmp_path, edit=edit)(*launch)
    assert "static assertion failed" in capfd.readouterr().err
