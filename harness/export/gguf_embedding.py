"""Round embedding and head to a smaller type of GGUF: F16, Q8_0 or Q6_K.

gguf writes Q8_0 and cannot write Q6_K, which stores 256 columns in 210 bytes (6.56 bits a weight): 128 bytes
with the low four bits of q + 32, 64 bytes with the high two bits, an int8 scale for each 16 columns, and d in
float16. A weight is d * scale * q with q from -32 to 31.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# Rows that are rounded at a time, so that the temporary arrays stay small.
ROWS = 1024
# Steps of a group's scale around the one that its largest magnitude gives, as in llama.cpp's own quantizer.
TRIED = np.arange(-9, 10) / 10


def round_rows(values: Float32, kind: str) -> NDArray[np.uint8]:
    """Encode the rows of an embedding.

    Parameters
    ----------
    values : (n, m) float32
        The embedding; m is a multiple of the columns of a group.
    kind : {"F16", "Q8_0", "Q6_K"}
        Type of GGUF.

    Returns
    -------
    (n, bytes of a row) uint8
    """
    if kind == "Q6_K":
        parts = [_q6_k(values[start : start + ROWS]) for start in range(0, len(values), ROWS)]
        return np.concatenate(parts)
    return gguf.quants.quantize(values, Type[kind]).view(np.uint8)


def _q6_k(values: Float32) -> NDArray[np.uint8]:
    groups = values.reshape(-1, 16, 16)
    scales = _group_scales(groups)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    d = (largest / -128).astype(np.float16)
    step = d.astype(np.float32)
    codes = np.clip(np.rint(_ratio(scales, step)), -128, 127)
    q = np.clip(np.rint(_ratio(groups, (step * codes)[..., None])), -32, 31).astype(np.int8) + 32

    # Halves of 128 columns; four runs of 32 columns share the bytes of a half.
    runs = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([runs[:, :, i] & 15 | (runs[:, :, i + 2] & 15) << 4 for i in (0, 1)], axis=-1)
    high = runs[:, :, 0] >> 4 | runs[:, :, 1] >> 4 << 2 | runs[:, :, 2] >> 4 << 4 | runs[:, :, 3] >> 4 << 6
    parts = (
        low.reshape(-1, 128),
        high.reshape(-1, 64),
        codes.astype(np.int8).view(np.uint8),
        d.astype("<f2").view(np.uint8),
    )
    return np.concatenate(parts, axis=-1).reshape(len(values), -1)


def _group_scales(groups: Float32) -> Float32:
    """Scale of every 16 columns that leaves the least squared error, weighted by squared values."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    best = np.zeros(groups.shape[:2], dtype=np.float32)
    gain = np.full(groups.shape[:2], -np.inf, dtype=np.float32)
    weight = groups**2
    for tried in TRIED:
        q = np.clip(np.rint(_ratio(-(32 + tried) * groups, largest)), -32, 31)
        product, square = (weight * groups * q).sum(axis=-1), (weight * q * q).sum(axis=-1)
        scale = _ratio(product, square)
        better = scale * product > gain  # what the scale takes from the squared error
        best, gain = np.where(better, scale, best), np.where(better, scale * product, gain)
    return best.astype(np.float32)


def _ratio(numerator: Float32, denominator: Float32) -> Float32:
    """Divide, with 0 where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.zeros(shape, np.float32), where=denominator != 0)
