"""When the damping is raised, and how far; types of what is compensated."""

import numpy as np
import pytest

import gpu
from gpu import gptq
from gpu.gptq import compensate, eliminate, invert_damped
from reference import gptq as reference


@pytest.mark.parametrize(
    ("coupling", "damping", "used"),
    # [[1, c], [c, 1]] has the eigenvalue 1 - c, so damping must exceed c - 1.
    [(0.5, 0.0, 0.0), (1.005, 0.001, 0.01), (1.05, 0.001, 0.1), (1.5, 0.01, 1.0), (1.5, 0.7, 0.7)],
)
def test_damping_is_raised_in_steps_of_ten_until_there_is_an_inverse(coupling, damping, used):
    C = np.array([[1.0, coupling], [coupling, 1.0]])
    Hinv, reported = invert_damped(gpu.to_device(C), damping)
    # Repeated multiplication by ten rounds.
    assert reported == pytest.approx(used, rel=1e-15)
    np.testing.assert_allclose(gpu.to_host(Hinv) @ (C + used * np.eye(2)), np.eye(2), atol=1e-12)


@pytest.mark.parametrize(
    ("C", "damping", "tried"),
    [
        (np.ones((3, 3)), 0.0, r"3 inputs, 0 dead\).*with damping 0;"),
        (np.diag([1.0, 0.0, 1.0]) + np.fliplr(np.diag([1.0, 0.0, 1.0])), 0.0, "3 inputs, 1 dead"),
        (np.array([[1.0, 1.5], [1.5, 1.0]]), 0.02, "with damping 0.02, 0.2;"),
        (np.array([[1.0, 3.0], [3.0, 1.0]]), 0.01, "with damping 0.01, 0.1, 1;"),
    ],
)
def test_no_inverse_is_an_error_that_lists_what_was_tried(C, damping, tried):
    with pytest.raises(np.linalg.LinAlgError, match=tried):
        invert_damped(gpu.to_device(C), damping)


@pytest.mark.parametrize(
    ("C", "damping"),
    [
        (np.ones((3, 3)), 6e-18),
        (np.outer([1.0, -1.0, 1.0], [1, -1, 1]), 6e-18),
        (np.outer([1, 1, 1, 0], [1, 1, 1, 0]) + np.diag([0, 0, 0, 2.0**-10]), 4e-18),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**30, 2.0**-30])
def test_what_is_singular_to_rounding_is_damped_as_in_the_reference(C, damping, scale):
    # The second step has a factor, and a condition above 1/ε. A power of two changes no mantissa.
    C = C * scale
    _, used = invert_damped(gpu.to_device(C), damping)
    assert used == pytest.approx(1000 * damping, rel=1e-14, abs=0)
    assert used == reference.invert_damped(C, damping)[1]


def test_what_is_no_factor_is_noticed_whatever_its_condition(monkeypatch):
    monkeypatch.setattr(gptq, "cholesky", lambda H: gpu.to_device(np.eye(3)))
    with pytest.raises(np.linalg.LinAlgError, match=r"with damping 0\.5;"):
        invert_damped(gpu.to_device(np.eye(3) + 0.25), 0.5)
    with pytest.raises(np.linalg.LinAlgError, match="Hinv is not positive definite"):
        eliminate(gpu.to_device(2 * np.eye(4)), [0, 1, 2], [3])


def test_weights_keep_their_type_when_they_are_compensated():
    for dtype in (np.float32, np.float64):
        W = gpu.to_device(np.ones((2, 3), dtype))
        E, Hinv_BB = gpu.to_device(np.ones((2, 1))), gpu.to_device(np.full((1, 1), 4.0))
        moved = compensate(W, E, Hinv_BB, gpu.to_device(np.full((1, 3), 2.0)))
        assert moved.dtype == dtype
        np.testing.assert_array_equal(gpu.to_host(moved), np.full((2, 3), 0.5))


def test_positions_may_come_from_the_host():
    Hinv = gpu.to_device(np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 1.0]]))
    # Without the first: what is left of [[3, 1], [1, 1]] is 3 - 1/2.
    np.testing.assert_allclose(gpu.to_host(eliminate(Hinv, [0], [1, 2])), [[2.5, 1], [1, 1]], rtol=1e-15)
