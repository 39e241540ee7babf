"""Degenerate and invalid inputs of the steps beyond the paper, with exact answers.

Nothing is at stake in a dead input, a row without a scale keeps its trits, and what has no weight in a
joint grid stays as it is.
"""

from __future__ import annotations

import numpy as np

from golden.arithmetic import Array
from golden.drafts import Drafts
from golden.exact import correlated, sixteenths, trits


def targets(drafts: Drafts) -> None:
    W, X_hat, Y = sixteenths(111, 2, 5), sixteenths(112, 3, 5), sixteenths(113, 3, 2)
    X_hat[:, 2] = 0
    given = {"Y": Y, "W": W, "X_hat": X_hat}
    drafts.add("targets.lost_products", "dead-input", given)
    drafts.add("targets.lost_products", "nothing-lost", {**given, "Y": X_hat @ W.T})
    one = {"Y": Y[:1], "W": W, "X_hat": X_hat[:1]}
    drafts.add("targets.lost_products", "one-token", {**one, "omega": np.array([[0.5]])})
    drafts.add("targets.lost_products", "weights-of-0", {**given, "omega": np.zeros((3, 1))})
    drafts.add("targets.token_weights", "zero-token", {"h": [[1, -3, 0, 2], [0, 0, 0, 0], [0.5, 0, 0, 0]]})
    drafts.add("targets.token_weights", "one-number", {"h": [[-4]]})
    C, D = correlated(114, 5), sixteenths(115, 2, 5, 4000)
    shifted = {"W": W, "C": C, "D": D}
    drafts.add("targets.shift_targets", "no-strength", shifted, strength=0.0)
    drafts.add("targets.shift_targets", "nothing-lost", {**shifted, "D": np.zeros((2, 5))})
    drafts.add("targets.shift_targets", "undamped", shifted, damping=0.0)
    # Products with a dead input are 0; whatever is given for them is ignored.
    for label, gram in (("dead-inputs", with_dead(C, [0, 3])), ("zero-gram", np.zeros((5, 5)))):
        drafts.add("targets.shift_targets", label, {**shifted, "C": gram})
    raised = {"W": W[:, :2], "C": np.array([[1, 1.0625], [1.0625, 1]]), "D": D[:, :2] / 1024}
    drafts.add("targets.shift_targets", "damping-raised", raised, damping=1 / 128)


def whole_rows(drafts: Drafts) -> None:
    n, m = 4, 7
    W, T = sixteenths(116, n, m), trits(117, n, m)
    equal = np.array([[0] * m, [1] * m, [-1] * m, [1] * 3 + [0] * 4], dtype=np.int8)
    alpha, mu = sixteenths(118, n, 3, 8) + 9 / 16, sixteenths(119, n, 3, 4)
    full = correlated(120, m) + 64 * np.eye(m)
    none = np.zeros((m, m))
    grams = {
        "full": full,
        "dead-inputs": with_dead(full, [1, 4]),
        "dead-block": with_dead(full, [3, 4, 5]),
        "zero-gram": none,
    }
    signs = np.array([[1, -1, 0], [-1, 0, -0.5], [0, 0, 0], [-2, 0.25, -0.25]])
    starts: dict[str, dict] = {
        **{label: {"H": H} for label, H in grams.items() if label != "full"},
        "equal-trits": {"T": equal},
        "alpha-0-or-negative": {"alpha": signs},
        "on-the-grid": {"W": np.repeat(alpha, 3, axis=1)[:, :m] * T + np.repeat(mu, 3, axis=1)[:, :m]},
    }
    for label, change in starts.items():
        given = {"W": W, "T": T, "alpha": alpha, "mu": mu, "H": full, **change}
        drafts.add("joint.align_jointly", label, given, block_size=3)
        drafts.add("descent.descend", label, given, block_size=3)
        drafts.add("refine.refine", label, given, block_size=3)
        if label in ("dead-block", "equal-trits"):  # a mu that is not fitted stays, whatever it is
            drafts.add("joint.align_jointly", f"{label}-symmetric", given, block_size=3, symmetric=True)
    given = {"W": W, "T": T, "alpha": alpha[:, :1], "mu": mu[:, :1], "H": full}
    single = {"W": W[:, :1], "T": T[:, :1], "alpha": alpha[:, :1], "mu": mu[:, :1], "H": full[:1, :1]}
    wide = {"W": W, "T": T, "alpha": np.repeat(alpha, 3, axis=1)[:, :m], "mu": mu[:, [0] * m], "H": full}
    for operation in ("joint.align_jointly", "descent.descend", "refine.refine"):
        drafts.add(operation, "block-wider-than-matrix", given, block_size=9)
        drafts.add(operation, "one-column", single, block_size=4)
        drafts.add(operation, "blocks-of-one", wide, block_size=1)
    drafts.add("descent.descend", "no-sweep", given, block_size=9, sweeps=0)
    # With H = I and alpha = 1 the best is w itself. Halves go to 0; a step that gains nothing is not taken.
    halves = [[0.5, -0.5, 1.5, -1.5, 0.5, -0.5], [0.5, -0.5, 3, -3, 0, 0.25]]
    ties = {
        "W": halves,
        "T": np.array([[0, 0, 1, -1, 1, -1], [1, -1, 0, 0, 1, -1]], dtype=np.int8),
        "alpha": np.ones((2, 1)),
        "mu": np.zeros((2, 1)),
        "H": np.eye(6),
    }
    drafts.add("descent.descend", "ties", ties, block_size=6, ties=True)

    drafts.add("joint.whole_error", "no-error", {"W": W, "W_hat": W, "H": full})
    for label, H in grams.items():
        drafts.add("joint.whole_error", label, {"W": W, "W_hat": T / 2, "H": H})
        drafts.add("joint.damped_objective", label, {"C": H}, damping=0.25)
    drafts.add("joint.damped_objective", "no-damping", {"C": full}, damping=0.0)
    drafts.add("joint.spread", "one-column", {"grid": alpha[:, :1]}, columns=1, block_size=128)
    drafts.add("joint.spread", "one-column-in-a-block", {"grid": alpha}, columns=5, block_size=2)

    uncoupled = {"W": W, "alpha": alpha[:, :1], "mu": mu[:, :1], "Hinv": np.eye(m) / 4}
    feed_forward = "feedforward.round_fed_forward"
    why = "Uncorrelated inputs: nothing is fed forward"
    drafts.add(feed_forward, "uncoupled", uncoupled, hidden={"H": 4 * np.eye(m)}, why=why)
    one = {"W": W[:, :1], "alpha": alpha[:, :1], "mu": mu[:, :1], "Hinv": np.array([[0.25]])}
    drafts.add(feed_forward, "one-column", one, hidden={"H": np.array([[4.0]])})
    dyadic = np.array([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]])
    block = {
        "W": W[:, :3],
        "alpha": signs[:, :1],
        "mu": mu[:, :1],
        "Hinv": np.array([[3.0, -2, 1], [-2, 4, -2], [1, -2, 3]]) / 4,
    }
    drafts.add(feed_forward, "alpha-0-or-negative", block, hidden={"H": dyadic})


def refused(drafts: Drafts) -> None:
    refuse = drafts.refuse
    W, H, T = sixteenths(81, 2, 3), correlated(82, 3), trits(83, 2, 3)
    X_hat, Y = sixteenths(121, 4, 3), sixteenths(122, 4, 2)
    lost = {"Y": Y, "W": W, "X_hat": X_hat}
    omega = np.array([[1], [0.5], [-0.25], [1]])
    refuse("targets.lost_products", "negative-omega", {**lost, "omega": omega}, "ValueError")
    refuse("targets.lost_products", "omega-of-other-tokens", {**lost, "omega": np.ones((3, 1))}, "ValueError")
    refuse("targets.lost_products", "other-tokens", {**lost, "Y": Y[:3]}, "ValueError")
    refuse("targets.lost_products", "other-outputs", {**lost, "Y": Y[:, :1]}, "ValueError")
    refuse("targets.lost_products", "other-inputs", {**lost, "X_hat": X_hat[:, :2]}, "ValueError")
    refuse("targets.token_weights", "nan", {"h": [[1, np.nan]]}, "ValueError")
    shifted = {"W": W, "C": H, "D": W}
    for label, strength in (("negative", -0.01), ("beyond-1", 1.01)):
        refuse("targets.shift_targets", f"strength-{label}", shifted, "ValueError", strength=strength)
    refuse("targets.shift_targets", "shape", {**shifted, "D": W[:, :2]}, "ValueError")
    refuse("targets.shift_targets", "negative-damping", shifted, "ValueError", damping=-0.1)
    singular = {**shifted, "C": np.ones((3, 3))}
    refuse("targets.shift_targets", "singular-undamped", singular, "LinAlgError", damping=0.0)

    grid = np.ones((2, 2))
    given = {"W": W, "T": T, "alpha": grid, "mu": grid, "H": H}
    changes = {
        "not-a-trit": {"T": 2 * T},
        "one-block-too-few": {"alpha": grid[:, :1]},
        "one-block-too-many": {"mu": np.ones((2, 3))},
        "other-rows": {"alpha": grid[:1]},
        "nan": {"mu": np.full((2, 2), np.nan)},
        "not-symmetric": {"H": H + np.triu(np.full((3, 3), H.max()), 1)},
        "shape": {"H": H[:2, :2]},
    }
    for operation in ("joint.align_jointly", "descent.descend", "refine.refine"):
        for label, change in changes.items():
            refuse(operation, label, given | change, "ValueError", block_size=2)
    refuse("descent.descend", "negative-sweeps", given, "ValueError", block_size=2, sweeps=-1)
    refuse("refine.refine", "no-rounds", given, "ValueError", block_size=2, rounds=0)
    for operation in ("joint.align_jointly", "descent.descend", "refine.refine"):
        refuse(operation, "blocks-of-none", given, "ValueError", block_size=0)
    refuse("joint.spread", "blocks-of-none", {"grid": grid}, "ValueError", columns=4, block_size=0)
    refuse("joint.spread", "one-block-too-few", {"grid": grid}, "ValueError", columns=5, block_size=2)
    refuse("joint.whole_error", "shape", {"W": W, "W_hat": W[:, :2], "H": H}, "ValueError")
    refuse("joint.damped_objective", "negative-damping", {"C": H}, "ValueError", damping=-0.5)
    column = np.ones((2, 1))
    block = {"W": W, "alpha": column, "mu": column, "Hinv": np.eye(3)}
    refuse("feedforward.round_fed_forward", "shape", {**block, "alpha": column[:1]}, "ValueError")
    indefinite = {**block, "Hinv": np.ones((3, 3)) - np.eye(3)}
    refuse("feedforward.round_fed_forward", "indefinite", indefinite, "LinAlgError")


def with_dead(C: Array, dead: list[int]) -> Array:
    result = C.copy()
    result[dead] = 0
    result[:, dead] = 0
    return result
