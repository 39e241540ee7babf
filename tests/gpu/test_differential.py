"""Operation by operation against the reference, on the reference's own inputs, at odd sizes."""

from itertools import product

import numpy as np
import pytest

import gpu
from golden.cases import Case
from harness.backends import load_backend
from harness.verify.tolerances import TOLERANCES, check
from reference.aga import align_grid, output_error
from reference.atq import build_optimal_grid, flexible_round
from reference.layout import Layout
from reference.packing import pack_2bit, pack_base3
from reference.types import CodedGrid
from tests.reference.strategies import GRAM_KINDS, random_gram

SHAPES = [(1, 1), (3, 2), (2, 127), (5, 128), (1, 129), (7, 151), (130, 577)]
DTYPES = ("float32", "float64")
GPU, REFERENCE = load_backend("gpu").operations, load_backend("reference").operations


def strided(array):
    """The same numbers in every second row and column of a larger array."""
    wide = np.full([2 * size + 1 for size in array.shape], 3, dtype=array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def inputs(operation, shape, dtype, kind="correlated"):
    """Arguments by name; weights hold float32 numbers in either type, so the answer is the same."""
    rng = np.random.default_rng([*shape, TOLERANCES_ORDER.index(operation)])
    n, m = shape
    W = (rng.normal(size=shape) + rng.normal(size=(n, 1))).astype(np.float32).astype(dtype)
    T = rng.integers(-1, 2, size=shape).astype(np.int8)
    alpha, mu = rng.normal(size=(n, 1)), rng.normal(size=(n, 1))
    C = random_gram(rng, m, kind)
    grid = {"alpha": alpha, "mu": mu}
    Hinv = np.linalg.inv(C + 0.1 * np.diag(C).mean() * np.eye(m))
    Hinv = (Hinv + Hinv.T) / 2
    k = max(1, m // 3)
    B, R = np.arange(0, k), np.arange(k, m)
    H = C + 0.1 * np.diag(C).mean() * np.eye(m)
    whole = {"alpha": rng.normal(size=(n, -(-m // 50))), "mu": rng.normal(size=(n, -(-m // 50)))}
    rows = {"W": W, "T": T, **whole, "H": H, "block_size": 50}
    return {
        "twn.symmetric_ternarize": {"W": W},
        "atq.ternary_init": {"W": W},
        "atq.weight_error": {"W": W, **grid, "T": T},
        "atq.weight_error_gradient": {"W": W, **grid, "T": T},
        "atq.build_optimal_grid": {"W": W, "T": T},
        "atq.flexible_round": {"W": W, **grid},
        "atq.iterative_ternary_fitting": {"W": W},
        "aga.output_error": {"W": W, "W_hat": (alpha * T + mu).astype(dtype), "C": C},
        "aga.output_error_gradient": {"W": W, **grid, "T": T, "C": C},
        "aga.align_grid": {"W": W, "T": T, "C": random_gram(rng, m)},
        "ssr.permute": {"A": W, "permutation": rng.permutation(m)},
        "ssr.cosine_similarity": {"W": W},
        "ssr.select_block": {"W": W, "k": k},
        "ssr.block_variance": {"W": W, "block_size": 50},
        "gptq.gram": {"X": W},
        "gptq.damp": {"C": C, "damping": 0.01},
        "gptq.invert_damped": {"C": C, "damping": 0.1},
        "gptq.compensate": {
            "W_R": W[:, k:].astype(np.float64),
            "E": 0.1 * W[:, :k],
            "Hinv_BB": Hinv[:k, :k],
            "Hinv_BR": Hinv[:k, k:],
        },
        "gptq.eliminate": {"Hinv": Hinv, "B": B, "R": R},
        "targets.lost_products": {
            "Y": rng.normal(size=(9, n)).astype(np.float32).astype(dtype),
            "W": W,
            "X_hat": rng.normal(size=(9, m)).astype(np.float32).astype(dtype),
            "omega": rng.uniform(size=(9, 1)),
        },
        "targets.token_weights": {"h": W},
        "targets.shift_targets": {"W": W, "C": C, "D": rng.normal(size=shape)},
        "feedforward.round_fed_forward": {"W": W, **grid, "Hinv": Hinv},
        "joint.whole_error": {"W": W, "W_hat": (alpha * T + mu).astype(dtype), "H": H},
        "joint.damped_objective": {"C": C, "damping": 0.1},
        "joint.spread": {"grid": whole["alpha"], "columns": m, "block_size": 50},
        "joint.align_jointly": rows,
        "descent.descend": rows,
        "refine.refine": rows,
        "grids.row_factor": {"W": W},
        "grids.encode": {"value": mu, "row": np.abs(rng.normal(size=(n, 1))).astype(np.float16)},
        "packing.pack_base3": {"trits": T},
        "packing.unpack_base3": {"packed": pack_base3(T), "count": m},
        "packing.pack_2bit": {"trits": T},
        "packing.unpack_2bit": {"packed": pack_2bit(T), "count": m},
        "layout.lay_words": {"trits": T},
        "layout.lay_grid": {
            "grid": rng.normal(size=(n, -(-m // 64), 2)).astype(np.float16),
            "columns": m,
            "block_size": 64,
        },
        "layout.lay_out": {
            "packed": pack_base3(T),
            "scale": rng.normal(size=(n, -(-m // 128))).astype(np.float16),
            "shift": rng.normal(size=(n, -(-m // 128))).astype(np.float16),
            "permutation": rng.permutation(m),
            "block_size": 128,
        },
        "matmul.matmul": {
            "x": rng.normal(size=(5, m)).astype(np.float32).astype(dtype),
            "packed": pack_base3(T),
            "scale": rng.normal(size=(n, -(-m // 50))).astype(np.float16),
            "shift": rng.normal(size=(n, -(-m // 50))).astype(np.float16),
            "permutation": rng.permutation(m),
            "block_size": 50,
        },
    }[operation]


TOLERANCES_ORDER = list(TOLERANCES)
# Whole matrices have tests of their own: test_ternarize.py, test_layout.py.
ELSEWHERE = {"ternarize.ternarize", "layout.join"}
OPERATIONS = [o for o in TOLERANCES if o not in gpu.REFUSED | ELSEWHERE]
# A remainder is needed, so that there is something to compensate.
NEED_TWO = ("gptq.compensate", "gptq.eliminate")


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_agrees_with_the_reference(operation, shape, dtype, layout):
    if operation in NEED_TWO and shape[1] == 1:
        shape = (shape[0], 2)
    arguments = inputs(operation, shape, dtype)
    expected = REFERENCE[operation](**arguments)

    def given(value):
        if not isinstance(value, np.ndarray):
            return value
        return gpu.to_device(strided(value) if layout == "strided" else value)

    got = GPU[operation](**{name: given(value) for name, value in arguments.items()})
    outputs = list(TOLERANCES[operation])
    if isinstance(expected, CodedGrid | Layout):
        outputs = [name for name in outputs if getattr(expected, name) is not None]
        expected, got = ([getattr(value, name) for name in outputs] for value in (expected, got))
    elif len(outputs) == 1:
        expected, got = (expected,), (got,)
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    case = Case(
        f"{operation} {shape}",
        operation,
        "real",
        "the reference",
        arrays,
        outputs={name: np.asarray(value) for name, value in zip(outputs, expected, strict=True)},
    )
    answer = {name: np.asarray(gpu.to_host(value)) for name, value in zip(outputs, got, strict=True)}
    if operation == "ssr.permute":  # weights keep their type here
        answer["permuted"] = answer["permuted"].astype(np.float64)
    assert [finding.miss for finding in check(case, answer) if finding.miss] == []


@pytest.mark.parametrize("kind", GRAM_KINDS)
def test_alignment_on_every_kind_of_gram_matrix(kind):
    rng = np.random.default_rng(7)
    W = rng.normal(size=(9, 20)) + rng.normal(size=(9, 1))
    T = rng.integers(-1, 2, size=W.shape).astype(np.int8)
    T[0], T[1] = 0, 1  # rows that determine no scale
    C = random_gram(rng, 20, kind)

    given = (gpu.to_device(array) for array in (W, T, C))
    alpha, mu = (gpu.to_host(grid) for grid in GPU["aga.align_grid"](*given))
    alpha_reference, mu_reference = align_grid(W, T, C)
    error = output_error(W, alpha * T + mu, C)
    error_reference = output_error(W, alpha_reference * T + mu_reference, C)
    # The cost is flat around its minimum, so it agrees to rounding where the grid is ill-determined.
    assert abs(error - error_reference) <= 1e-12 * output_error(W, np.zeros_like(W), C)
    if kind not in ("low rank", "correlated"):
        np.testing.assert_allclose(alpha, alpha_reference, atol=1e-9)
        np.testing.assert_allclose(mu, mu_reference, atol=1e-9)


def test_ties_of_small_integers_go_to_zero_as_in_the_reference():
    # Means and grids of four small integers are exact, so a tie is one in both.
    W = np.array(list(product(range(5), repeat=4)), dtype=np.float64)
    T = np.random.default_rng(0).integers(-1, 2, size=W.shape).astype(np.int8)
    alpha, mu = build_optimal_grid(W, T)
    assert ((np.abs(W - mu) == np.abs(alpha) / 2) & (alpha != 0)).sum() > 10
    start = (alpha, mu, T)
    one_round = GPU["atq.iterative_ternary_fitting"](
        gpu.to_device(W), 1, tuple(gpu.to_device(part) for part in start)
    )
    np.testing.assert_array_equal(gpu.to_host(one_round[2]), flexible_round(W, alpha, mu))
