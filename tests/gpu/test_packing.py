"""The packing kernels, with 32 lanes in Numba's simulator or on the device, and at full sizes."""

import numpy as np
import pytest

import gpu
from gpu import packing
from gpu.device import STANDIN
from gpu.kernels.packing import pack_rows, unpack_rows
from reference import packing as reference

LAYOUTS = {"base3": (5, 3), "2bit": (4, 4)}
SIMULATED = [(1, 1), (3, 2), (1, 127), (2, 128), (3, 129)]
STOOD_IN = [(0, 7), (4, 0), (130, 151), (130, 577), (2, 3, 11), (6,)]


def functions(package, layout):
    return getattr(package, f"pack_{layout}"), getattr(package, f"unpack_{layout}")


def codes(layout):
    """Every byte that is one."""
    digits, base = LAYOUTS[layout]
    numbers = range(min(256, base**digits))
    return [byte for byte in numbers if all(byte // base**i % base < 3 for i in range(digits))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "simulate"), [(s, STANDIN) for s in SIMULATED] + [(s, False) for s in STOOD_IN]
)
def test_bytes_are_those_of_the_reference_and_come_back(shape, simulate, layout):
    trits = np.random.default_rng(shape).integers(-1, 2, size=shape).astype(np.int8)
    packed, damage = pack_rows(gpu.to_device(trits), *LAYOUTS[layout], simulate=simulate)
    np.testing.assert_array_equal(gpu.to_host(packed), functions(reference, layout)[0](trits))
    assert packed.dtype == np.uint8
    assert damage.tolist() == [packed.size, packed.size]
    unpacked, damage = unpack_rows(packed, shape[-1], *LAYOUTS[layout], simulate=simulate)
    np.testing.assert_array_equal(gpu.to_host(unpacked), trits)
    assert unpacked.dtype == np.int8
    assert damage.tolist() == [packed.size, packed.size]


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_is_a_code_or_damage(layout, simulate):
    digits, base = LAYOUTS[layout]
    every = np.arange(256, dtype=np.uint8)
    good = np.isin(every, codes(layout))
    assert good.sum() == 3**digits
    trits, _ = unpack_rows(gpu.to_device(every), 256 * digits, digits, base, simulate=simulate)
    trits = gpu.to_host(trits).reshape(256, digits)
    np.testing.assert_array_equal((trits[good] + 1) @ base ** np.arange(digits), every[good])
    for byte in every[~good]:
        _, damage = unpack_rows(gpu.to_device(np.array([[byte]])), digits, digits, base)
        assert damage.tolist() == [0, 1]


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_damaged_byte_is_found(layout, simulate):
    digits, base = LAYOUTS[layout]
    packed = functions(reference, layout)[0](np.zeros((3, 40 * digits - 1), np.int8))
    packed[1, 39] = 0  # filled up with t = -1
    packed[2, [37, 3, 38]] = 255
    trits, damage = unpack_rows(gpu.to_device(packed), 40 * digits - 1, digits, base, simulate=simulate)
    assert damage.tolist() == [83, 79]
    assert not gpu.to_host(trits)[0].any()


@pytest.mark.parametrize("simulate", {STANDIN, False})
@pytest.mark.parametrize("bad", [-128, -2, 2, 127])
def test_the_first_byte_with_no_trits_is_found(bad, simulate):
    trits = np.zeros((2, 300), np.int8)
    trits[1, [299, 23]] = bad
    for digits, base in LAYOUTS.values():
        _, damage = pack_rows(gpu.to_device(trits), digits, base, simulate=simulate)
        assert damage.tolist()[0] == 300 // digits + 23 // digits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byte", [255, 243, 12])
def test_damage_is_refused_in_the_words_of_the_reference(layout, byte):
    digits, _ = LAYOUTS[layout]
    packed = functions(reference, layout)[0](np.zeros((2, 3 * digits), np.int8))
    packed[1, 1:] = byte, 254
    for package, array in ((reference, packed), (packing, gpu.to_device(packed))):
        with pytest.raises(ValueError) as refusal:
            functions(package, layout)[1](array, 3 * digits - 1)
        if package is reference:
            expected = str(refusal.value)
    assert str(refusal.value) == expected


@pytest.mark.parametrize("bad", [2, -2, 0.5, 256.0, 255, np.nan, np.inf, 2**40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_trit_is_refused(layout, bad):
    pack, _ = functions(packing, layout)
    with pytest.raises(ValueError, match="trits must be -1, 0 or"):
        pack(gpu.to_device(np.array([0, 1, bad])))


@pytest.mark.parametrize("dtype", ["int16", "int64", "float32", "float64"])
def test_trits_of_any_type_are_packed(dtype):
    trits = np.random.default_rng(0).integers(-1, 2, size=(3, 11))
    for layout in LAYOUTS:
        packed = functions(packing, layout)[0](gpu.to_device(trits.astype(dtype)[:, ::2]))
        np.testing.assert_array_equal(gpu.to_host(packed), functions(reference, layout)[0](trits[:, ::2]))


def test_an_unsigned_byte_is_no_negative_trit():
    with pytest.raises(ValueError, match="trits must be"):
        packing.pack_base3(gpu.to_device(np.array([255], np.uint8)))


def test_lists_are_taken_as_by_the_reference():
    assert gpu.to_host(packing.pack_base3([1, 0, -1, 0, 0, 1])).tolist() == [113, 122]
    with pytest.raises(ValueError, match="must be uint8, got int64"):
        packing.unpack_base3([113, 122], 6)
