"""Input that no equation is defined for is refused by every function, and named."""

import numpy as np
import pytest

from reference import (
    aga,
    atq,
    baselines,
    descent,
    feedforward,
    gptq,
    joint,
    refine,
    ssr,
    targets,
    ternarize,
    twn,
)

W = np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
T = np.array([[1, -1, 0], [0, 1, -1]])
ALPHA, MU = np.ones((2, 1)), np.zeros((2, 1))
C = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])

# A grid of blocks of one column.
ROWS = {"W": W, "T": T, "alpha": np.ones((2, 3)), "mu": np.zeros((2, 3)), "H": C, "block_size": 1}

FUNCTIONS = {
    "symmetric_ternarize": (twn.symmetric_ternarize, {"W": W}),
    "ternary_init": (atq.ternary_init, {"W": W}),
    "weight_error": (atq.weight_error, {"W": W, "alpha": ALPHA, "mu": MU, "T": T}),
    "weight_error_gradient": (atq.weight_error_gradient, {"W": W, "alpha": ALPHA, "mu": MU, "T": T}),
    "build_optimal_grid": (atq.build_optimal_grid, {"W": W, "T": T}),
    "flexible_round": (atq.flexible_round, {"W": W, "alpha": ALPHA, "mu": MU}),
    "iterative_ternary_fitting": (atq.iterative_ternary_fitting, {"W": W}),
    "output_error": (aga.output_error, {"W": W, "W_hat": W, "C": C}),
    "output_error_gradient": (
        aga.output_error_gradient,
        {"W": W, "alpha": ALPHA, "mu": MU, "T": T, "C": C},
    ),
    "align_grid": (aga.align_grid, {"W": W, "T": T, "C": C}),
    "align_grid_printed": (aga.align_grid_printed, {"W": W, "T": T, "C": C}),
    "permute": (ssr.permute, {"A": W, "permutation": [2, 0, 1]}),
    "cosine_similarity": (ssr.cosine_similarity, {"W": W}),
    "select_block": (ssr.select_block, {"W": W, "k": 2}),
    "block_variance": (ssr.block_variance, {"W": W, "block_size": 2}),
    "gram": (gptq.gram, {"X": W}),
    "damp": (gptq.damp, {"C": C, "damping": 0.01}),
    "invert_damped": (gptq.invert_damped, {"C": C, "damping": 0.01}),
    "compensate": (gptq.compensate, {"W_R": W, "E": W[:, :2], "Hinv_BB": np.eye(2), "Hinv_BR": W}),
    "eliminate": (gptq.eliminate, {"Hinv": C, "B": np.array([0]), "R": np.array([1, 2])}),
    "lost_products": (targets.lost_products, {"Y": W.T, "W": W, "X_hat": C, "omega": np.ones((3, 1))}),
    "token_weights": (targets.token_weights, {"h": W}),
    "shift_targets": (targets.shift_targets, {"W": W, "C": C, "D": W}),
    "round_fed_forward": (feedforward.round_fed_forward, {"W": W, "alpha": ALPHA, "mu": MU, "Hinv": C}),
    "whole_error": (joint.whole_error, {"W": W, "W_hat": W, "H": C}),
    "damped_objective": (joint.damped_objective, {"C": C, "damping": 0.1}),
    "spread": (joint.spread, {"grid": W, "columns": 3, "block_size": 1}),
    "align_jointly": (joint.align_jointly, ROWS),
    "descend": (descent.descend, ROWS),
    "refine": (refine.refine, ROWS),
    "ternarize": (ternarize.ternarize, {"W": W, "C": C}),
    "round_to_nearest": (baselines.round_to_nearest, {"W": W}),
    "gptq": (baselines.gptq, {"W": W, "C": C}),
}
MATRICES = ("W", "W_hat", "W_R", "A", "X", "E", "alpha", "mu", "Hinv_BR", "Y", "X_hat", "D", "h", "grid")
GRAMS = ("C", "H", "Hinv", "Hinv_BB")


def spoiled(name, value):
    """Every way to spoil the argument `name`, with what the message must say."""
    array = np.array(value, dtype=float)
    if name in MATRICES + GRAMS:
        for bad in (np.nan, np.inf, -np.inf):
            broken = array.copy()
            broken[-1, -1] = bad
            last = tuple(size - 1 for size in array.shape)
            yield broken, rf"\b{name}\[{last[0]}, {last[1]}\] is -?(nan|inf)"
        yield array.ravel(), rf"\b{name} must be a non-empty matrix"
        yield array[:0], rf"\b{name} must be a non-empty matrix"
        yield array.astype(complex), rf"\b{name} must be real numbers"
    if name in GRAMS:
        tilted = array.copy()
        tilted[0, 1] += 1e-3
        yield tilted, rf"\b{name} is not symmetric"
        negative = array.copy()
        negative[1, 1] = -1e-9
        yield negative, rf"\b{name}\[1, 1\] = -1e-09"
        yield array[:-1], rf"\b{name} has shape"
    if name == "T":
        for bad in (2, -2, 0.5, np.nan):
            broken = array.copy()
            broken[0, 0] = bad
            yield broken, r"\bT must hold only"
    if name in ("T", "W_hat", "alpha", "mu", "D", "Y", "omega"):
        yield array[:-1], rf"\b{name} has shape"
        yield array.T, rf"\b{name} has shape"


CASES = [
    pytest.param(function, {**arguments, name: broken}, message, id=f"{called}-{name}-{i}")
    for called, (function, arguments) in FUNCTIONS.items()
    for name, value in arguments.items()
    for i, (broken, message) in enumerate(spoiled(name, value))
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_bad_argument_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_good_arguments_are_accepted_and_left_alone(function, arguments):
    before = {name: np.array(value, copy=True) for name, value in arguments.items()}
    function(**arguments)
    assert all(np.array_equal(value, before[name]) for name, value in arguments.items())


@pytest.mark.parametrize("function", [aga.align_grid, aga.align_grid_printed])
def test_gram_matrix_of_another_layer_is_refused(function):
    with pytest.raises(ValueError, match=r"C has shape \(2, 2\), expected \(3, 3\)"):
        function(W, T, np.eye(2))


def test_weights_and_gram_matrix_must_fit():
    for function in (ternarize.ternarize, baselines.gptq):
        with pytest.raises(ValueError, match=r"C has shape \(4, 4\), expected \(3, 3\)"):
            function(W, np.eye(4))


def test_blocks_of_the_inverse_must_fit():
    for arguments in (
        {"Hinv_BR": np.ones((2, 4))},
        {"Hinv_BR": np.ones((3, 3))},
        {"Hinv_BB": np.eye(3)},
        {"W_R": np.ones((1, 3))},
    ):
        with pytest.raises(ValueError, match="has shape"):
            gptq.compensate(**{**FUNCTIONS["compensate"][1], **arguments})


@pytest.mark.parametrize("block_size", [0, -1])
@pytest.mark.parametrize("function", [joint.align_jointly, descent.descend, refine.refine])
def test_blocks_of_no_columns_are_refused(function, block_size):
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        function(**{**ROWS, "block_size": block_size})
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        joint.spread(W, 3, block_size)


def test_rounding_in_a_gram_matrix_is_not_asymmetry():
    tilted = C.copy()
    # A sum of float32 products differs from its transpose by about 1e-7 of its size.
    tilted[0, 1] *= 1 + 1e-7
    assert aga.output_error(W, W, tilted) == 0.0


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_asymmetry_is_judged_at_the_size_of_the_matrix(scale):
    tilted = C * scale
    # The largest entry is 2, and the share that is allowed 1e-6.
    tilted[0, 1] += 1.8e-6 * scale
    assert aga.output_error(W, W, tilted) == 0.0
    tilted[0, 1] += 0.4e-6 * scale
    with pytest.raises(ValueError, match="C is not symmetric"):
        aga.output_error(W, W, tilted)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_real_numbers_of_any_type_are_taken(dtype):
    alpha, T = twn.symmetric_ternarize(np.array([[0, 4, 0, 0]], dtype=dtype))
    assert (alpha.tolist(), T.tolist()) == ([[4.0]], [[0, 1, 0, 0]])
