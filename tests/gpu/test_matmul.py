"""The product with a ternary matrix by whatever kernel `multiply` picks here, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import gpu
from gpu import matmul
from gpu.device import STANDIN, xp
from gpu.kernels import choice, product
from gpu.kernels.sources import Limits
from gpu.layout import join
from reference.matmul import matmul as expected_product
from reference.packing import pack_base3
from tests.gpu.ternary_cases import (
    DTYPES,
    Case,
    assert_close,
    coded_case,
    hostile_cases,
    lay_out,
    random_case,
    to_bits,
    values,
)

SHAPES = [(1, 1), (2, 127), (127, 2), (128, 129), (129, 577)]


def multiply(case, x):
    return gpu.to_host(matmul.multiply(gpu.to_device(x), lay_out(case)))


def rounds_weights(case, x):
    """Whether the kernel that `multiply` picks for these does."""
    x, layout = gpu.to_device(x), lay_out(case)
    return matmul._kernel(x, layout, library=False).name == "warpgroup"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 65])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_product_is_that_of_the_reference(shape, tokens, dtype):
    for block_size in (128, 50):  # the second has no fast kernel
        case = random_case(*shape, block_size)
        x = case.activations(tokens, dtype)
        y = multiply(case, x)
        assert y.dtype == x.dtype
        assert_close(case, x, y, rounded=rounds_weights(case, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hostile_cases())
def test_hostile_numbers(name, dtype):
    case, x = hostile_cases()[name]
    x = to_bits(x, dtype)
    assert_close(case, x, multiply(case, x), rounded=rounds_weights(case, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(bad, tokens, dtype):
    case = random_case(7, 300, 128)
    case.scale[2] = case.shift[2] = 0
    case.trits[3] = 0
    x = case.activations(tokens, np.float32)
    clean = multiply(case, to_bits(x, dtype))
    for column in (0, 299):
        dirty = x.copy()
        dirty[1, case.permutation[column]] = bad
        y = multiply(case, to_bits(dirty, dtype))
        assert not np.isfinite(values(y[1])).any()
        np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


@pytest.mark.skipif(not STANDIN, reason="this is the simulator's")
@pytest.mark.parametrize(("shape", "block_size"), [((2, 129), 64), ((1, 1), 128), ((3, 70), 9)])
def test_the_plain_kernel_in_the_simulator(shape, block_size):
    case = random_case(*shape, block_size)
    x = case.activations(2, np.float64)
    simulated = product.multiply(x, lay_out(case), simulate=True)
    assert_close(case, x, simulated)
    np.testing.assert_allclose(simulated, product.multiply(x, lay_out(case)), rtol=0, atol=1e-12)


def test_trits_are_where_the_layout_says():
    trits = np.random.default_rng(0).integers(-1, 2, size=(35, 600)).astype(np.int8)
    case = Case(trits, np.ones((35, 5), np.float16), np.ones((35, 5), np.float16), np.arange(600), 128)
    words = gpu.to_host(lay_out(case).words)
    assert words.shape == (2, 3, 32, 16)
    filled = np.zeros((64, 768), np.int8)
    filled[:35, :600] = trits
    for j in range(768):
        r, t = divmod(j % 256 // 16, 4)
        for row in range(64):
            digit = words[row // 32, j // 256, row % 32, 4 * t + r] >> (2 * (j % 16)) & 3
            assert digit == filled[row, j] + 1


@pytest.mark.parametrize(("block_size", "pairs"), [(64, 4), (128, 2), (256, 1), (1024, 1)])
@pytest.mark.parametrize("make", [random_case, coded_case])
def test_grids_are_where_the_layout_says(make, block_size, pairs):
    case = make(35, 600, block_size)
    layout = lay_out(case)
    grid = gpu.to_host(layout.grid)
    assert grid.shape == (2, 3, 32, pairs, 2)
    if make is coded_case:
        rows = gpu.to_host(layout.row_factors).reshape(2, 1, 32, 1, 1).astype(np.float64)
        grid = (
            rows * gpu.to_host(layout.block_factors)[0].reshape(1, 3, 1, pairs, 2) * grid.astype(np.float64)
        )
    for row in range(64):
        for column in range(0, 768, 64):
            pair = grid[row // 32, column // 256, row % 32, column % 256 * pairs // 256]
            inside = row < 35 and column // block_size < case.grid[0].shape[1]
            expected = [g[row, column // block_size] if inside else 0 for g in case.grid]
            np.testing.assert_allclose(pair, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 512, 50])
def test_codes_and_joined_matrices(block_size, dtype):
    cases = [coded_case(rows, 700, block_size) for rows in (40, 3, 33)]
    x = cases[0].activations(5, dtype)
    layouts = [lay_out(case) for case in cases]
    for count in (1, 2, 3):
        layout = join(layouts[:count])
        y = gpu.to_host(matmul.multiply(gpu.to_device(x), layout))
        assert y.shape == (5, sum(case.trits.shape[0] for case in cases[:count]))
        begin = 0
        for case in cases[:count]:
            assert_close(case, x, y[:, begin : begin + len(case.trits)])
            begin += len(case.trits)
    # Which of them come first makes no difference.
    two = join([join(layouts[:2]), layouts[2]])
    assert two.ends == layout.ends
    np.testing.assert_array_equal(gpu.to_host(two.words), gpu.to_host(layout.words))


def test_more_columns_than_two_bytes_can_name():
    columns = 2**16 + 300
    case = random_case(2, columns, 1024)
    layout = lay_out(case)
    assert layout.permutation.dtype == np.uint32
    x = case.activations(2, np.float32)
    assert_close(case, x, gpu.to_host(matmul.multiply(gpu.to_device(x), layout)))
    whole = lay_out(random_case(2, 2**16, 1024))
    np.testing.assert_array_equal(gpu.to_host(whole.permutation)[0], random_case(2, 2**16, 1024).permutation)


def test_matrices_that_do_not_fit_together_are_refused():
    layouts = [lay_out(random_case(3, 70, 64)) for _ in range(4)]
    for others in (
        layouts[1:],
        [lay_out(random_case(3, 71, 64))],
        [lay_out(random_case(3, 70, 128))],
        [lay_out(coded_case(3, 70, 64))],
    ):
        with pytest.raises(ValueError, match="1 to 3 matrices with the same columns"):
            join([layouts[0], *others])


def test_products_go_where_they_are_asked_to():
    case = random_case(9, 200, 128)
    x = gpu.to_device(case.activations(3, np.float16))
    layout = lay_out(case)
    y = xp.zeros((3, 9), np.float16)
    assert matmul.multiply(x, layout, y) is y
    np.testing.assert_array_equal(gpu.to_host(y), gpu.to_host(matmul.multiply(x, layout)))
    for wrong, error in (
        (xp.zeros((3, 8), np.float16), ValueError),
        (xp.zeros((3, 9), np.float32), TypeError),
    ):
        with pytest.raises(error, match=r"^y "):
            matmul.multiply(x, layout, wrong)


def test_the_chosen_launcher_multiplies(monkeypatch):
    case, device = random_case(9, 200, 128), Limits(80, 99 * 1024, 3)
    x, layout = gpu.to_device(case.activations(3, np.float16)), lay_out(case)
    seen = []

    def multiply(*arguments):
        seen.append(arguments[:3])
        arguments[3][:] = 7

    monkeypatch.setattr(matmul, "_limits", lambda x: device)
    monkeypatch.setattr(choice, "TABLE", [kernel._replace(multiply=multiply) for kernel in choice.TABLE])
    y = matmul.multiply(x, layout)
    assert (y == 7).all()
    ((given, *others),) = seen
    assert given is x
    assert others == [layout, device]


def test_other_grids_are_kept():
    case = random_case(4, 130, 64)
    rng = np.random.default_rng(1)
    case = Case(case.trits, *rng.normal(size=(2, 4, 3)), case.permutation, 64)
    for dtype in DTYPES:
        x = case.activations(3, dtype)
        assert_close(case, x, multiply(case, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_tensors_come_through_dlpack(dtype):
    case = random_case(9, 200, 128)
    x = torch.from_numpy(case.activations(4, np.float32)).to(dtype)
    x = x if STANDIN else x.cuda()
    taken = gpu.to_device(x.view(torch.int16) if dtype == torch.bfloat16 else x)
    y = torch.from_dlpack(matmul.multiply(taken, lay_out(case))).view(dtype).cpu()
    host = x.cpu().to(torch.float64).numpy()
    exact = expected_product(host, pack_base3(case.trits), *case.grid, case.permutation, 128)
    assert (
        torch.equal(y, torch.from_numpy(exact).to(dtype))
        or (y - exact).abs().max() < 2**-6 * abs(exact).max()
    )


def test_activations_of_any_strides_are_multiplied():
    case = random_case(9, 40, 16)
    arrays = [gpu.to_device(a) for a in (pack_base3(case.trits), case.scale, case.shift, case.permutation)]
    x = np.random.default_rng(0).normal(size=(7, 80))
    strided = gpu.to_device(np.asfortranarray(x))[:, ::2]
    expected = expected_product(
        x[:, ::2], pack_base3(case.trits), case.scale, case.shift, case.permutation, 16
    )
    np.testing.assert_allclose(gpu.to_host(matmul.matmul(strided, *arrays, 16)), expected, rtol=1e-12)


def test_no_tokens_give_no_rows():
    case = random_case(9, 200, 128)
    assert multiply(case, case.activations(0, np.float16)).shape == (0, 9)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (xp.zeros((2, 199), np.float16), ValueError, r"x has shape \(2, 199\), expected \(2, 200\)"),
        (xp.zeros((2, 200), np.int32), TypeError, "x must be float16 or .* got int32"),
        (xp.zeros(200, np.float16), ValueError, "x must have 2 dimensions"),
        (xp.zeros((2, 400), np.float16)[:, ::2], ValueError, "x must be contiguous"),
        (xp.zeros((200, 2), np.float16).T, ValueError, "x must be contiguous"),
        (torch.zeros(2, 200), TypeError, "x must be an array of .* got Tensor"),
        ([[0.0] * 200], TypeError, "x must be an array of .* got list"),
    ],
)
def test_activations_that_do_not_fit_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        matmul.multiply(x, lay_out(random_case(9, 200, 128)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"words": lambda a: a.words[:, :, :, :15]}, ValueError, "words must be contiguous"),
        ({"words": lambda a: a.words[:, :, :, :15].copy()}, ValueError, "words has shape"),
        ({"words": lambda a: a.words.astype(np.int32)}, TypeError, "words must be uint32"),
        ({"grid": lambda a: a.grid[:, :, :1].copy()}, ValueError, "grid has shape"),
        ({"grid": lambda a: a.grid.astype(np.float32)}, TypeError, "grid must be float16 or int8"),
        ({"grid": lambda a: a.grid[0, 0]}, TypeError, "grid must be float32 or float64"),
        ({"grid": lambda a: xp.zeros((31, 2, 2))}, ValueError, "grid has shape"),
        ({"grid": lambda a: a.grid.astype(np.int8)}, ValueError, "row_factors are needed"),
        ({"row_factors": lambda a: xp.zeros(32, np.float16)}, ValueError, "row_factors are not for a grid"),
        ({"permutation": lambda a: a.permutation.astype(np.int64)}, TypeError, "permutation must be uint16"),
        ({"permutation": lambda a: a.permutation[:, :200].copy()}, ValueError, "permutation has shape"),
        ({"permutation": lambda a: list(a.permutation)}, TypeError, "permutation must be an array"),
        ({"block_size": lambda a: 0}, ValueError, "block_size must be at least 1"),
        ({"columns": lambda a: 0}, ValueError, "columns must be at least 1"),
        ({"ends": lambda a: (9, 9)}, ValueError, "increasing row numbers"),
        ({"ends": lambda a: ()}, ValueError, "increasing row numbers"),
        ({"ends": lambda a: (1, 2, 3, 4)}, ValueError, "increasing row numbers"),
        ({"ends": lambda a: (33,)}, ValueError, "words has shape"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(change, error, message):
    layout = lay_out(random_case(9, 200, 128))
    changed = {name: value(layout) for name, value in change.items()}
    with pytest.raises(error, match=message):
        replace(layout, **changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_factors": None}, "block_factors are needed"),
        ({"row_factors": xp.zeros(31, np.float16)}, "row_factors has shape"),
        ({"block_factors": xp.zeros((1, 1, 1, 2), np.float16)}, "block_factors has shape"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(lay_out(coded_case(9, 200, 128)), **change)


@pytest.mark.parametrize(
    ("x", "message"), [(np.full((2, 7), np.inf), "x"), (np.zeros((2, 12)), "permutation")]
)
def test_activations_of_the_reference_that_do_not_fit_are_refused(x, message):
    case = random_case(3, 7, 3)
    arrays = (x, pack_base3(case.trits), case.scale, case.shift, case.permutation)
    with pytest.raises(ValueError, match=message):
        matmul.matmul(*(gpu.to_device(array) for array in arrays), 3)


@pytest.mark.parametrize("function", ["matmul", "lay_out"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.zeros((3, 2))}, "scale"),
        ({"shift": np.zeros((2, 3))}, "shift"),
        ({"shift": np.full((3, 3), np.nan)}, "shift"),
        ({"packed": np.full((3, 2), 243, dtype=np.uint8)}, "byte 243"),
        ({"permutation": np.arange(13)}, "permutation|bytes a row"),
        ({"permutation": np.zeros(7, dtype=int)}, "permutation"),
        ({"permutation": np.arange(7) - 1}, "permutation"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(changes, message, function):
    case = random_case(3, 7, 3)
    given = {
        "x": case.activations(2, np.float64),
        "packed": pack_base3(case.trits),
        "scale": case.scale,
        "shift": case.shift,
        "permutation": case.permutation,
        "block_size": 3,
    } | changes
    if function == "lay_out":
        del given["x"]
    arguments = {k: gpu.to_device(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        getattr(matmul, function)(**arguments)
