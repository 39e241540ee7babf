"""What the formats of other programs can hold of a ternary matrix.

`harness.quantize --for` asks before quantization, `harness.export` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Models in which nothing but gate(x) * up(x) lies before down_proj, and nothing but attention between v_proj
# and o_proj: where the order of those columns can be moved into the rows of the matrices before.
FOLDABLE_MODELS = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmoe",
    "gemma3_text",
    "smollm3",
    "phi3",
)
# The matrix whose columns may have any order there.
FOLDABLE = "down_proj"


@dataclass(frozen=True)
class Container:
    """A type of tensor that holds trits and the grid of every group of neighbouring columns.

    Attributes
    ----------
    name : str
        Name of the type.
    columns : int
        Columns of a group; a row is a whole number of groups.
    size : int
        Bytes of a group.
    shift : bool
        Whether a group has an offset; without one, mu is 0.
    """

    name: str
    columns: int
    size: int
    shift: bool

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.columns

    def misfit(self, columns: int, block_size: int, symmetric: bool) -> str | None:
        """Say what the type lacks for a matrix, or needs; None if the matrix fits.

        Parameters
        ----------
        columns : int
            Columns of the matrix.
        block_size : int
            Columns that share alpha and mu.
        symmetric : bool
            Whether mu is 0.
        """
        if not (self.shift or symmetric):
            return "has no mu (--shift none quantizes without)"
        if columns % self.columns:
            return f"needs rows of a multiple of {self.columns} columns, not {columns}"
        if block_size % self.columns and block_size < columns:
            return f"needs a --block-size that is a multiple of {self.columns}, not {block_size}"
        return None


# From the smallest to the largest.
GGUF_TYPES = (
    Container("TQ1_0", 256, 54, shift=False),
    Container("TQ2_0", 256, 66, shift=False),
    Container("Q2_0", 64, 18, shift=False),
    Container("Q2_K", 256, 84, shift=True),
    Container("Q4_1", 32, 20, shift=True),
)
# Affine groups of 2 bits, with scale and bias in float16.
MLX_GROUPS = tuple(Container(f"groups of {size}", size, size // 4 + 4, shift=True) for size in (128, 64, 32))


def smallest(
    types: Sequence[Container], columns: int, block_size: int, symmetric: bool
) -> tuple[Container | None, dict[str, str]]:
    """Find the first type that holds a matrix; also give, by name, what those before it lack."""
    lacking: dict[str, str] = {}
    for candidate in types:
        reason = candidate.misfit(columns, block_size, symmetric)
        if reason is None:
            return candidate, lacking
        lacking[candidate.name] = reason
    return None, lacking
