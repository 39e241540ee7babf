"""What matrices are fitted to after ternary layers."""

import numpy as np
import pytest

import gpu
from gpu.targets import lost_products, shift_targets, token_weights
from reference import targets as reference


def inputs(tokens=40, rows=5, columns=7, dtype="float64"):
    rng = np.random.default_rng([tokens, rows, columns])
    X_hat = rng.normal(size=(tokens, columns)).astype(dtype)
    W = rng.normal(size=(rows, columns)).astype(dtype)
    Y = (X_hat @ W.T + rng.normal(size=(tokens, rows))).astype(dtype)
    return Y, W, X_hat, rng.uniform(0.1, 2, size=(tokens, 1))


def on_host(function, *arguments, **options):
    given = [gpu.to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return np.asarray(gpu.to_host(function(*given, **options)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 5, 7), (9, 130, 33)], ids=str)
def test_lost_products_are_those_of_the_reference(shape, weighted, dtype):
    *arguments, omega = inputs(*shape, dtype)
    arguments += [omega] * weighted
    before = [argument.copy() for argument in arguments]
    got, expected = on_host(lost_products, *arguments), reference.lost_products(*arguments)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    for argument, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_a_token_without_a_stream_has_no_weight():
    h = np.array([[3.0, 4.0], [0.0, 0.0], [1e-100, 0.0]], np.float64)
    np.testing.assert_allclose(on_host(token_weights, h), [[2 / 25], [0.0], [2e200]], rtol=1e-14)
    assert on_host(token_weights, h.astype(np.float32)).dtype == np.float64


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_shifted_weights_are_ridge_regression_towards_the_outputs(strength):
    """By least squares with the penalty as further rows."""
    Y, W, X_hat, omega = inputs()
    C = X_hat.T @ (omega * X_hat)
    D = on_host(lost_products, Y, W, X_hat, omega)
    got = on_host(shift_targets, W, C, D, damping=0.3, strength=strength)
    root = np.sqrt(omega)
    penalty = np.sqrt(0.3 * np.diag(C).mean()) * np.eye(7)
    left = np.vstack([root * X_hat, penalty])
    right = np.vstack([root * Y, penalty @ W.T])
    full = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(got, W + strength * (full - W), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dead_inputs_keep_their_weights(dtype):
    Y, W, X_hat, _ = inputs(dtype=dtype)
    X_hat[:, 3] = 0
    C = X_hat.T.astype(float) @ X_hat
    D = reference.lost_products(Y, W, X_hat)
    D[:, 3] = 1.0
    got = on_host(shift_targets, W, C, D)
    np.testing.assert_array_equal(got[:, 3], W[:, 3])
    np.testing.assert_allclose(got, reference.shift_targets(W, C, D), rtol=0, atol=1e-12)
    assert got.dtype == np.float64


def test_what_has_no_meaning_is_refused():
    Y, W, X_hat, omega = inputs()
    C, D = X_hat.T @ X_hat, np.zeros(W.shape)
    omega[4] = -1
    for message, function, arguments in (
        ("Y has shape", lost_products, (Y[:, :2], W, X_hat)),
        ("X_hat has shape", lost_products, (Y, W, X_hat[:, :2])),
        ("omega has shape", lost_products, (Y, W, X_hat, omega[:3])),
        (r"omega\[4\] is negative", lost_products, (Y, W, X_hat, omega)),
        ("D has shape", shift_targets, (W, C, D[:2])),
        ("strength must be between 0 and 1, got 1.5", shift_targets, (W, C, D, 0.1, 1.5)),
        ("damping must be a finite number", shift_targets, (W, C, D, -0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            on_host(function, *arguments)
