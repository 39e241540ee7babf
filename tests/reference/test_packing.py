"""The checkpoint's bytes: base 3 and two bits a trit."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import packing
from reference.packing import pack_2bit, pack_base3, unpack_2bit, unpack_base3

CODECS = {
    "base3": (pack_base3, unpack_base3, (1, 3, 9, 27, 81)),
    "2bit": (pack_2bit, unpack_2bit, (1, 4, 16, 64)),
}
codecs = pytest.mark.parametrize(("pack", "unpack", "places"), CODECS.values(), ids=CODECS.keys())


def legal_bytes(places, count):
    """Byte value -> its first `count` trits, for every byte whose other trits are 0."""
    return {
        sum((t + 1) * p for t, p in zip(trits + (0,) * (len(places) - count), places, strict=True)): trits
        for trits in product((-1, 0, 1), repeat=count)
    }


@codecs
def test_every_length_to_1000_comes_back(pack, unpack, places):
    rng = np.random.default_rng(0)
    for length in range(1001):
        trits = rng.integers(-1, 2, size=(2, length)).astype(np.int8)
        packed = pack(trits)
        assert packed.dtype == np.uint8
        assert packed.shape == (2, (length + len(places) - 1) // len(places))
        unpacked = unpack(packed, length)
        assert unpacked.dtype == np.int8
        assert np.array_equal(unpacked, trits)


@codecs
def test_every_byte_is_decoded_or_refused_for_every_filling(pack, unpack, places):
    for count in range(1, len(places) + 1):
        legal = legal_bytes(places, count)
        assert len(legal) == 3**count
        for byte in range(256):
            packed = np.array([byte], dtype=np.uint8)
            if byte in legal:
                assert tuple(unpack(packed, count)) == legal[byte]
                assert pack(unpack(packed, count)).tolist() == [byte]
            else:
                with pytest.raises(ValueError, match=r"is not the code of|must be filled up with t = 0"):
                    unpack(packed, count)


def test_legal_base3_bytes_are_those_up_to_242():
    assert sorted(legal_bytes((1, 3, 9, 27, 81), 5)) == list(range(243))


def test_layout_by_hand():
    # digits 2, 1, 0, 1, 1 and 2, then filled up with 1: 2 + 3 + 27 + 81 and 2 + 3 + 9 + 27 + 81
    assert pack_base3([1, 0, -1, 0, 0, 1]).tolist() == [113, 122]
    # digits 0, 0, 0, 0, 2 and five times 2
    assert pack_base3([-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]).tolist() == [162, 242]
    # bits 01 00 01 10 read from the highest trit down, then 01 01 01 10
    assert pack_2bit([1, 0, -1, 0, 1]).tolist() == [0b01000110, 0b01010110]
    assert unpack_base3(np.array([113, 122], dtype=np.uint8), 6).tolist() == [1, 0, -1, 0, 0, 1]
    assert unpack_2bit(np.array([70, 86], dtype=np.uint8), 5).tolist() == [1, 0, -1, 0, 1]


def test_the_version_is_that_of_the_description():
    assert f"format version {packing.FORMAT_VERSION}:" in packing.__doc__


@codecs
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32])
def test_trits_of_any_type_are_packed(pack, unpack, places, dtype):
    trits = np.array([[1, 0, -1, -1, 1, 1, 0]])
    assert np.array_equal(pack(trits.astype(dtype)), pack(trits))


@codecs
def test_rows_are_packed_one_by_one(pack, unpack, places):
    trits = np.random.default_rng(1).integers(-1, 2, size=(2, 3, 7))
    packed = pack(trits)
    for index in np.ndindex(2, 3):
        assert np.array_equal(packed[index], pack(trits[index]))
    assert np.array_equal(unpack(packed, 7), trits)


@codecs
def test_no_trits_take_no_bytes(pack, unpack, places):
    assert pack([]).tolist() == []
    assert unpack(np.zeros((3, 0), dtype=np.uint8), 0).shape == (3, 0)


@codecs
@pytest.mark.parametrize("value", [2, -2, 0.5, np.nan, 255, 127])
def test_what_is_no_trit_is_not_packed(pack, unpack, places, value):
    with pytest.raises(ValueError, match="trits"):
        pack([0, value, 1])


@codecs
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float64])
def test_only_uint8_is_unpacked(pack, unpack, places, dtype):
    with pytest.raises(ValueError, match="uint8"):
        unpack(np.array([121], dtype=dtype), 3)


@codecs
def test_a_length_below_zero_and_a_byte_without_a_row_are_refused(pack, unpack, places):
    with pytest.raises(ValueError, match="-1 trits take"):
        unpack(np.zeros((2, 0), dtype=np.uint8), -1)
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        unpack(np.array(13, dtype=np.uint8), 1)


@codecs
@pytest.mark.parametrize("count", [-1, 0, 11, 100])
def test_a_length_that_does_not_fit_is_refused(pack, unpack, places, count):
    with pytest.raises(ValueError, match="bytes a row"):
        unpack(pack(np.zeros(2 * len(places), dtype=np.int8))[:2], count)


def test_a_bad_byte_is_named_wherever_it_is():
    packed = pack_base3(np.zeros((3, 12), dtype=np.int8))
    packed[1, 0] = 250
    with pytest.raises(ValueError, match="byte 250"):
        unpack_base3(packed, 12)
    codes = pack_2bit(np.zeros((3, 12), dtype=np.int8))
    codes[2, 1] = 0b01110101
    with pytest.raises(ValueError, match=f"byte {0b01110101}"):
        unpack_2bit(codes, 12)


@codecs
@given(data=st.lists(st.sampled_from([-1, 0, 1]), max_size=30))
def test_a_prefix_of_whole_bytes_keeps_its_bytes(pack, unpack, places, data):
    whole = len(data) // len(places) * len(places)
    assert np.array_equal(pack(data)[: whole // len(places)], pack(data[:whole]))
