"""Input that no equation is defined for is refused as by the reference, in the same words."""

import numpy as np
import pytest

import gpu
from gpu import aga, atq, gptq, packing, ssr, twn
from harness.backends import load_backend
from tests.reference import test_checks as reference
from tests.reference.test_checks import ALPHA, MU, C, T, W

OPERATIONS = load_backend("gpu").operations
REFUSED = {name.rpartition(".")[2] for name in gpu.REFUSED}
FUNCTIONS = {
    name: (OPERATIONS[f"{function.__module__.removeprefix('reference.')}.{name}"], arguments)
    for name, (function, arguments) in reference.FUNCTIONS.items()
    if name not in REFUSED and function.__module__ != "reference.baselines"
}


def on_device(arguments):
    return {
        name: gpu.to_device(np.asarray(value)) if isinstance(value, np.ndarray | list) else value
        for name, value in arguments.items()
    }


CASES = [
    pytest.param(name, argument, broken, message, id=f"{name}-{argument}-{i}")
    for name, (_, arguments) in FUNCTIONS.items()
    for argument, value in arguments.items()
    for i, (broken, message) in enumerate(reference.spoiled(argument, value))
]


@pytest.mark.parametrize(("name", "argument", "broken", "message"), CASES)
def test_bad_argument_is_named(name, argument, broken, message):
    function, arguments = FUNCTIONS[name]
    with pytest.raises(ValueError, match=message):
        function(**on_device({**arguments, argument: broken}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_arguments_are_accepted_and_left_alone(name):
    function, arguments = FUNCTIONS[name]
    given = on_device({key: np.array(value) if np.ndim(value) else value for key, value in arguments.items()})
    function(**given)
    for key, value in arguments.items():
        np.testing.assert_array_equal(np.asarray(gpu.to_host(given[key])), value)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_asymmetry_is_judged_at_the_size_of_the_matrix(scale):
    weights = gpu.to_device(W)
    tilted = C * scale
    # The largest entry is 2, and the share that is allowed 1e-6.
    tilted[0, 1] += 1.8e-6 * scale
    assert aga.output_error(weights, weights, gpu.to_device(tilted)) == 0.0
    tilted[0, 1] += 0.4e-6 * scale
    with pytest.raises(ValueError, match="C is not symmetric"):
        aga.output_error(weights, weights, gpu.to_device(tilted))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float32])
def test_real_numbers_of_any_type_are_taken(dtype):
    row = gpu.to_device(np.array([[0, 4, 0, 0]], dtype=dtype))
    alpha, trits = twn.symmetric_ternarize(row)
    assert (alpha.tolist(), trits.tolist()) == ([[4.0]], [[0, 1, 0, 0]])
    # Only float32 is computed with as it is.
    assert ssr.permute(row, gpu.to_device(np.arange(4))).dtype == (
        dtype if dtype == np.float32 else np.float64
    )


def test_blocks_of_the_inverse_must_fit():
    _, arguments = FUNCTIONS["compensate"]
    for changes in (
        {"Hinv_BR": np.ones((2, 4))},
        {"Hinv_BR": np.ones((3, 3))},
        {"Hinv_BB": np.eye(3)},
        {"W_R": np.ones((1, 3))},
    ):
        with pytest.raises(ValueError, match="has shape"):
            gptq.compensate(**on_device({**arguments, **changes}))


@pytest.mark.parametrize("function", [gptq.damp, gptq.invert_damped])
@pytest.mark.parametrize("damping", [-0.01, np.inf, np.nan])
def test_damping_that_is_no_share_is_refused(function, damping):
    with pytest.raises(ValueError, match="damping must be a finite number that is not negative"):
        function(gpu.to_device(np.eye(2)), damping)


@pytest.mark.parametrize("number", [0, -3])
def test_numbers_below_one_are_refused(number):
    weights = gpu.to_device(W)
    with pytest.raises(ValueError, match=f"k must be at least 1, got {number}"):
        ssr.select_block(weights, number)
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {number}"):
        ssr.block_variance(weights, number)
    with pytest.raises(ValueError, match=f"max_iterations must be at least 1, got {number}"):
        atq.iterative_ternary_fitting(weights, number)


def test_one_is_enough():
    weights = gpu.to_device(W)
    assert len(ssr.select_block(weights, 1)) == 1
    assert ssr.block_variance(weights, 1) == 0.0
    # The start, the grid and the rounding, which changes nothing.
    assert len(atq.iterative_ternary_fitting(weights, 1)[3]) == 3


@pytest.mark.parametrize(
    "permutation", [[0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1], [[0, 1, 2]], [[0], [1], [2]]]
)
def test_what_is_no_permutation_is_refused(permutation):
    with pytest.raises(ValueError, match="permutation must hold every index from 0 to 2 once"):
        ssr.permute(gpu.to_device(W), gpu.to_device(np.array(permutation)))


@pytest.mark.parametrize("unpack", [packing.unpack_base3, packing.unpack_2bit])
def test_bytes_that_do_not_fit_are_refused(unpack):
    with pytest.raises(ValueError, match="must be uint8, got int64"):
        unpack(gpu.to_device(np.array([121])), 3)
    for packed, count in (([[]], -1), ([121], 0), ([121], 11), (13, 1)):
        with pytest.raises(ValueError, match=f"{count} trits take"):
            unpack(gpu.to_device(np.array(packed, dtype=np.uint8)), count)


def test_rows_without_a_scale_raise_no_warning():
    row, trits = gpu.to_device(np.array([[1.0, 2.0, 6.0]])), gpu.to_device(np.ones((1, 3), np.int8))
    with np.errstate(all="raise"):
        alpha, mu = atq.build_optimal_grid(row, trits)
        rounded = atq.flexible_round(row, alpha, mu)
    assert (alpha.item(), mu.item(), rounded.tolist()) == (0.0, 3.0, [[0, 0, 0]])


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_a_start_is_used_and_left_alone(dtype):
    weights = np.array([[0.0, 1.0, 5.0, 9.0]])
    trits = np.array([[-1, 1, 1, 1]], dtype=dtype)
    start = tuple(gpu.to_device(part) for part in (np.array([[5.0]]), np.array([[4.0]]), trits))
    alpha, mu, fitted, errors = atq.iterative_ternary_fitting(gpu.to_device(weights), start=start)
    # By hand: errors at the start 1, 64, 16, 0; then the grids 0, 2.5, 5 and 0.5, 3.75, 7 move one trit each.
    assert fitted.tolist() == [[-1, -1, 0, 1]]
    assert fitted.dtype == np.int8
    assert (alpha.item(), mu.item()) == pytest.approx((47 / 11, 53 / 11), rel=1e-14)
    assert errors[0] == 1 + 64 + 16
    assert [part.tolist() for part in start] == [[[5.0]], [[4.0]], [[-1, 1, 1, 1]]]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_start_that_does_not_fit_is_refused(part):
    start = [gpu.to_device(value) for value in (ALPHA, MU, T)]
    start[part] = start[part][:1]
    with pytest.raises(ValueError, match=f"{('alpha', 'mu', 'T')[part]} has shape"):
        atq.iterative_ternary_fitting(gpu.to_device(W), start=tuple(start))
