"""Numbers of several tokens side by side, as one value in functions that Numba compiles.

The numbers of a token lie in a flat float32 array, one after the other; those of `LANES` tokens in an array
with a second axis of that length. `load` reads an entry of either: one float32, or all tokens' as a value
that Numba does not have, a vector register (or two, where registers hold four numbers). A function written
with these operations works on both. They treat every number alone and in the order written, so it comes out
the same beside any others.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.extending import models, register_model

__all__ = ["LANES", "add", "load", "number", "scaled", "store", "subtract", "word", "zero"]

LANES = 8

# Numba passes the first argument of these functions itself, which type checkers cannot know.
intrinsic: Any = extending.intrinsic

_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Lanes(types.Type):
    """The type of an entry of `LANES` tokens."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _entry(array: Any) -> Any:
    """The type of an array's entries."""
    return types.float32 if array.ndim == 1 else _lanes


def _address(context: Any, builder: Any, signature: Any, arguments: Any, scale: int, to: Any) -> Any:
    """The address of an entry of the first argument, an array; the second counts the entries before."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    offset = builder.mul(arguments[1], arguments[1].type(scale))
    return builder.bitcast(builder.gep(array.data, [offset]), to.as_pointer())


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    scale, to = (1, ir.FloatType()) if signature.args[0].ndim == 1 else (LANES, _VECTOR)
    return _address(context, builder, signature, arguments, scale, to)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Read an entry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments), align=4)

    return _entry(array)(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write an entry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature, arguments), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _entry(array)), generate


@intrinsic
def zero(typing: Any, array: Any) -> Any:
    """An entry of zeros, for an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant_null(signature.return_type)

    return _entry(array)(array), generate


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic
def subtract(typing: Any, a: Any, b: Any) -> Any:
    """a - b."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fsub(*arguments)


@intrinsic
def scaled(typing: Any, a: Any, factor: Any) -> Any:
    """An entry times one float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, factor = arguments
        if signature.args[0] == _lanes:
            nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)(0)
            alone = builder.insert_element(nothing, factor, first)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            factor = builder.shuffle_vector(alone, nothing, everywhere)
        return builder.fmul(value, factor)

    return a(a, types.float32), generate


@intrinsic
def number(typing: Any, bits: Any) -> Any:
    """An int8, or the float16 whose bits a uint16 holds, as a float32; the float16 must be finite."""

    def from_half(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # By integers, because only some processors convert float16. Exponents of float16 are 112 less than
        # those of float32. A subnormal number is an integer times 2^-24, and as a float32 it must never be
        # one itself: threads may treat those as zero.
        integer, real = ir.IntType(32), ir.FloatType()
        half = builder.zext(arguments[0], integer)
        magnitude = builder.and_(half, integer(0x7FFF))
        small = builder.fmul(builder.uitofp(magnitude, real), real(2.0**-24))
        normal = builder.add(builder.shl(magnitude, integer(13)), integer(112 << 23))
        is_small = builder.icmp_unsigned("<", magnitude, integer(0x400))
        size = builder.select(is_small, builder.bitcast(small, integer), normal)
        sign = builder.shl(builder.and_(half, integer(0x8000)), integer(16))
        return builder.bitcast(builder.or_(size, sign), real)

    def from_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], ir.FloatType())

    return types.float32(bits), from_code if bits == types.int8 else from_half


@intrinsic
def word(typing: Any, array: Any, index: Any) -> Any:
    """Read eight bytes of a flat uint8 array as a uint64, the first in its lowest bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature, arguments, 1, ir.IntType(64)), align=1)

    return types.uint64(array, types.intp), generate
