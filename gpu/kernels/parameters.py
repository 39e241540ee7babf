"""The parameters of the CUDA C++ kernels: structs passed by value, mirrored by NumPy dtypes.

A kernel takes one struct. Its C++ declaration stands at the head of the kernel's file, with the shape of
every array; a `Struct` beside the launcher has the same fields by name. The offset and size of every field
are compared when the kernel is compiled, by the `static_assert`s of `Struct.assertions`.

CuPy passes a NumPy array of size one by value, whatever its dtype: `_pointer` in cupy/cuda/function.pyx of
14.0.0 and 14.2.0 gives the driver the address of its data, and the driver copies as many bytes as the struct
has. A `numpy.void` scalar is not such an array. CuPy checks no type; `Struct.of` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gpu.device import Array, xp
from gpu.kernels.layout import Layout
from reference.layout import PARTS

# Types of x by dtype, and the number format that each holds. CuPy has no bfloat16.
TYPES = {"float16": "float16", "uint16": "bfloat16", "int16": "bfloat16"}

# The range of a C++ int.
LEAST_INT, MOST_INT = -(2**31), 2**31 - 1


class Pointer:
    """A field that is a device array; or None, a null pointer, if `optional`.

    Parameters
    ----------
    *names : str
        dtypes that the array may have.
    optional : bool
        Whether it may be None.
    """

    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint64)

    def __init__(self, *names: str, optional: bool = False) -> None:
        self.names, self.optional = names, optional
        self.dtypes = frozenset(map(np.dtype, names))

    def check(self, struct: str, field: str, value: Any) -> None:
        """Refuse an array that the kernel cannot read."""
        if value is None and self.optional:
            return
        if not isinstance(value, xp.ndarray):
            raise TypeError(f"{struct}.{field} must be an array of {xp.__name__}, got {type(value).__name__}")
        if value.dtype not in self.dtypes:
            raise TypeError(f"{struct}.{field} must be {' or '.join(self.names)}, got {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{struct}.{field} must be contiguous in C order, got strides {value.strides}")


class Int:
    """A field that is a C++ int, or with a count an array of so many."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.dtype: np.dtype[Any] = np.dtype((np.int32, () if count is None else (count,)))

    def check(self, struct: str, field: str, value: Any) -> None:
        """Refuse values that are not ints or do not fit."""
        numbers = (value,) if self.count is None else value
        expected = 1 if self.count is None else self.count
        if len(numbers) != expected or any(type(number) is not int for number in numbers):
            raise TypeError(f"{struct}.{field} takes {expected} int, got {value!r}")
        if not all(LEAST_INT <= number <= MOST_INT for number in numbers):
            raise ValueError(f"{struct}.{field} does not fit into a C++ int: {value}")


class Struct:
    """A C++ struct: its name, its fields, and the NumPy dtype with the layout that C++ gives it.

    Parameters
    ----------
    name : str
        As the C++ source declares it.
    **fields : Pointer, Int or Struct
        By name, in the order of the declaration.
    """

    def __init__(self, name: str, **fields: Pointer | Int | Struct) -> None:
        self.name, self.fields = name, fields
        # Aligned as a C compiler aligns.
        self.dtype: np.dtype[Any] = np.dtype(
            [(field, kind.dtype) for field, kind in fields.items()], align=True
        )

    def of(self, **values: Any) -> Arguments:
        """Arguments of one launch, checked.

        Parameters
        ----------
        **values : array, int, tuple of int, dict or None
            A value for every field. A nested struct takes a dict.

        Raises
        ------
        TypeError
            If a field is missing or unknown, an array is not on the device or has another dtype, or a number
            is not an int.
        ValueError
            If an array is not contiguous in C order, or a number does not fit into a C++ int.
        """
        self.check(self.name, "", values)
        return Arguments(self, values)

    def check(self, struct: str, field: str, value: Mapping[str, Any]) -> None:
        """Refuse values that are not those of the fields; the arguments are those of every kind of field."""
        if value.keys() != self.fields.keys():
            raise TypeError(f"{self.name} has the fields {', '.join(self.fields)}, got {', '.join(value)}")
        for name, kind in self.fields.items():
            kind.check(self.name, name, value[name])

    def assertions(self) -> Iterator[str]:
        """C++ that compiles only if the declaration of the struct has this layout."""
        yield f'static_assert(sizeof({self.name}) == {self.dtype.itemsize}, "{self.name}");'
        for field, kind in self.fields.items():
            assert self.dtype.fields is not None
            offset = self.dtype.fields[field][1]
            yield (
                f"static_assert(__builtin_offsetof({self.name}, {field}) == {offset} && "
                f'sizeof({self.name}::{field}) == {kind.dtype.itemsize}, "{self.name}.{field}");'
            )


@dataclass(frozen=True)
class Arguments:
    """The values of a struct for one launch."""

    struct: Struct
    values: Mapping[str, Any]

    def packed(self, address: Callable[[Array], int]) -> np.ndarray:
        """The bytes that a kernel takes, as an array of no dimensions; `address` gives that of an array."""
        return np.array(_row(self.struct, self.values, address), self.struct.dtype)


def _row(struct: Struct, values: Mapping[str, Any], address: Callable[[Array], int]) -> tuple[Any, ...]:
    row: list[Any] = []
    for field, kind in struct.fields.items():
        value = values[field]
        if isinstance(kind, Struct):
            row.append(_row(kind, value, address))
        elif isinstance(kind, Pointer):
            row.append(0 if value is None else address(value))
        else:
            row.append(value)
    return tuple(row)


# x, what is made of x, and y.
ACTIVATIONS = Pointer(*TYPES)
SUMS = Pointer("float32")
PERMUTATION = Pointer("uint16")

MATRIX = Struct(
    "Matrix",
    words=Pointer("uint32"),
    grid=Pointer("float16", "int8"),
    block_factors=Pointer("float16", optional=True),
    row_factors=Pointer("float16", optional=True),
    permutation=PERMUTATION,
    m=Int(),
    pairs_shift=Int(),
    ends=Int(PARTS),
)


def matrix(layout: Layout) -> dict[str, Any]:
    """The values of `MATRIX` for a layout."""
    ends = layout.ends
    return {
        "words": layout.words,
        "grid": layout.grid,
        "block_factors": layout.block_factors,
        "row_factors": layout.row_factors,
        "permutation": layout.permutation,
        "m": layout.columns,
        "pairs_shift": layout.pairs_shift,
        "ends": ends + ends[-1:] * (PARTS - len(ends)),
    }
