"""Small cases with exact answers: multiples of 1/16, which float64 holds exactly, answered by `Exact`."""

from __future__ import annotations

import random

import numpy as np

from golden.answers import answer
from golden.arithmetic import Array, Exact, rational
from golden.cases import Case
from golden.drafts import Drafts

# As `reference.types.BEST`, repeated here.
BEST: dict = {
    "reorder": "none",
    "aga": "conditional",
    "feed_forward": True,
    "refinement": "descent",
    "damping": 0.3,
}
CONFIGS: dict[str, dict] = {
    "default": {},
    "none": {"reorder": "none"},
    "hessian": {"reorder": "hessian"},
    "conditional": {"aga": "conditional"},
    "printed": {"aga": "printed"},
    "no-aga": {"aga": "none"},
    "no-itf": {"itf": False},
    "one-iteration": {"max_iterations": 1},
    "twn": {"start": "twn"},
    "no-compensation": {"compensation": False},
    "undamped": {"damping": 0.0},
    "int8": {"grid": "int8"},
    "int8-hessian": {"grid": "int8", "reorder": "hessian"},
    "symmetric": {"shift": "none"},
    "symmetric-int8": {"shift": "none", "grid": "int8", "reorder": "hessian"},
    "symmetric-no-itf": {"shift": "none", "itf": False},
    "symmetric-no-aga": {"shift": "none", "aga": "none", "start": "twn"},
    "symmetric-conditional": {"shift": "none", "aga": "conditional"},
}
# Beyond the paper, on blocks wide enough for trits to move.
MORE_CONFIGS: dict[str, dict] = {
    "feed-forward": {"feed_forward": True},
    "feed-forward-printed": {"feed_forward": True, "aga": "printed"},
    "feed-forward-uncompensated": {"feed_forward": True, "compensation": False},
    "joint-grid": {"refinement": "grid"},
    "descent": {"refinement": "descent"},
    "descent-one-round": {"refinement": "descent", "rounds": 1, "compensation": False},
    "descent-int8": {"refinement": "descent", "grid": "int8", "reorder": "hessian"},
    "best": BEST,
    "best-int8": {**BEST, "grid": "int8"},
    "best-wide": {**BEST, "block_size": 9},
    "best-symmetric": {**BEST, "shift": "none"},
    "best-symmetric-int8": {**BEST, "shift": "none", "grid": "int8"},
    "joint-grid-symmetric": {"refinement": "grid", "shift": "none"},
}


def sixteenths(seed: int, rows: int, columns: int, largest: int = 16) -> Array:
    """Draw multiples of 1/16 by `random.random`, the only generator that is stable between versions."""
    source = random.Random(seed)
    span = 2 * largest + 1
    values = [[int(source.random() * span) - largest for _ in range(columns)] for _ in range(rows)]
    return np.array(values) / 16


def correlated(seed: int, columns: int, tokens: int = 0) -> Array:
    """Make an integer Gram matrix with a common component, so that Eq. 12 and Eq. 13 differ."""
    X = np.rint(sixteenths(seed, tokens or columns + 3, columns, 64))
    return (X + X[:, :1]).T @ (X + X[:, :1])


def trits(seed: int, rows: int, columns: int) -> Array:
    """Draw trits without a constant row."""
    T = np.sign(np.rint(sixteenths(seed, rows, columns, 24))).astype(np.int8)
    T[:, 0], T[:, 1] = 1, -1
    return T


def inverse(H: Array) -> Array:
    """Invert H in rational arithmetic, rounded once."""
    kit = Exact()
    return kit.solve(rational(H), rational(np.eye(len(H)))).astype(np.float64)


def matrix(seed: int, rows: int, columns: int, block_size: int, kind: str = "float16") -> dict[str, Array]:
    """Draw a ternary matrix in checkpoint form; `kind` is the dtype of alpha and mu, or int8 for codes."""
    source = random.Random(seed)
    T, blocks = trits(seed, rows, columns), -(-columns // block_size)
    made = {
        "packed": answer(Exact(), "packing.pack_base3", {"trits": T}, {})["packed"],
        "permutation": np.array(sorted(range(columns), key=lambda _: source.random()), dtype=np.uint16),
    }
    for name, own in (("scale", 1), ("shift", 2)):
        if kind == "int8":
            made[f"{name}.codes"] = (16 * sixteenths(seed + own, rows, blocks, 127)).astype(np.int8)
            made[f"{name}.row"] = (sixteenths(seed + 3, rows, 1) / 4 + 2).astype(np.float16)
            made[f"{name}.block"] = (sixteenths(seed + 3 + own, 1, blocks) / 64 + 1).astype(np.float16)
        else:
            made[name] = sixteenths(seed + own, rows, blocks, 2000).astype(kind)
    return made


def cases() -> list[Case]:
    """All exact cases."""
    drafts = Drafts("exact")
    _per_row(drafts)
    _per_matrix(drafts)
    _targets(drafts)
    _whole_rows(drafts)
    _packing(drafts)
    _layout(drafts)
    return drafts.cases


def _per_row(drafts: Drafts) -> None:
    W, C = sixteenths(1, 5, 7), correlated(2, 7)
    wide, wide_C = sixteenths(3, 3, 12, 160), correlated(4, 12)
    for label, w, c in (("small", W, C), ("wide", wide, wide_C), ("row", W[:1], C)):
        n, m = w.shape
        T = trits(5 + m, n, m)
        mu = sixteenths(6, n, 1, 4)
        alpha = sixteenths(7, n, 1, 8) + 9 / 16
        drafts.add("twn.symmetric_ternarize", label, {"W": w})
        drafts.add("atq.ternary_init", label, {"W": w})
        grid = {"W": w, "alpha": alpha, "mu": mu, "T": T}
        drafts.add("atq.weight_error", label, grid)
        drafts.add("atq.weight_error_gradient", label, grid)
        drafts.add("atq.build_optimal_grid", label, {"W": w, "T": T})
        drafts.add("atq.flexible_round", label, {"W": w, "alpha": alpha, "mu": mu}, ties=True)
        drafts.add("atq.iterative_ternary_fitting", label, {"W": w})
        drafts.add("atq.iterative_ternary_fitting", f"{label}-limit", {"W": w}, max_iterations=1)
        start = {"W": w, "start.alpha": alpha, "start.mu": mu, "start.T": T}
        drafts.add("atq.iterative_ternary_fitting", f"{label}-start", start)
        start = start | {"start.mu": 0 * mu}
        drafts.add("atq.build_optimal_grid", f"{label}-symmetric", {"W": w, "T": T}, symmetric=True)
        # A mean of dyadic weights that a tie hits is dyadic itself: nothing is rounded before.
        fitting = "atq.iterative_ternary_fitting"
        drafts.add(fitting, f"{label}-symmetric", {"W": w}, ties=True, symmetric=True)
        drafts.add(fitting, f"{label}-symmetric-start", start, ties=True, symmetric=True)
        W_hat = alpha * T + mu
        drafts.add("aga.output_error", label, {"W": w, "W_hat": W_hat, "C": c})
        drafts.add("aga.output_error_gradient", label, {**grid, "C": c})
        drafts.add("aga.align_grid", label, {"W": w, "T": T, "C": c})
        drafts.add("aga.align_grid", f"{label}-symmetric", {"W": w, "T": T, "C": c}, symmetric=True)
        drafts.add("aga.align_grid_printed", label, {"W": w, "T": T, "C": c})
    diagonal = np.diag(np.arange(1.0, 8.0))
    for operation in ("align_grid", "align_grid_printed"):
        why = "On a diagonal C Eq. 12 and Eq. 13 as printed agree"
        drafts.add(f"aga.{operation}", "diagonal", {"W": W, "T": trits(12, 5, 7), "C": diagonal}, why=why)
    # Both gradients vanish at the closed-form grid.
    exact = [[1, 1, -1, -1], [2, 2, 0, 0]]
    at_optimum = {
        "W": exact,
        "alpha": [[1], [1]],
        "mu": [[0], [1]],
        "T": np.array([[1, 1, -1, -1], [1, 1, -1, -1]], dtype=np.int8),
    }
    drafts.add("atq.weight_error", "on-the-grid", at_optimum)
    drafts.add("atq.weight_error_gradient", "on-the-grid", at_optimum)
    drafts.add("aga.output_error_gradient", "on-the-grid", {**at_optimum, "C": correlated(8, 4)})


def _per_matrix(drafts: Drafts) -> None:
    W, C = sixteenths(11, 4, 8), correlated(12, 8)
    permutation = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    drafts.add("ssr.permute", "small", {"A": W, "permutation": permutation})
    drafts.add("ssr.cosine_similarity", "small", {"W": W})
    for k in (1, 3, 7):
        drafts.add("ssr.select_block", f"k{k}", {"W": W}, k=k)
    for size in (3, 4):
        drafts.add("ssr.block_variance", f"blocks-of-{size}", {"W": W}, block_size=size)
    drafts.add("gptq.gram", "small", {"X": np.rint(sixteenths(13, 9, 5, 128))})
    drafts.add("gptq.damp", "small", {"C": C}, damping=1 / 128)
    drafts.add("gptq.invert_damped", "small", {"C": C}, damping=1 / 128)
    drafts.add("gptq.invert_damped", "undamped", {"C": C}, damping=0.0)
    H = C + np.eye(8)
    Hinv = inverse(H)
    for k in (1, 3, 7):
        blocks = {"Hinv_BB": Hinv[:k, :k], "Hinv_BR": Hinv[:k, k:]}
        drafts.add(
            "gptq.compensate", f"k{k}", {"W_R": W[:, k:], "E": W[:, :k] / 16, **blocks}, hidden={"H": H}
        )
        B = np.array(sorted(permutation[:k]))
        R = np.array(sorted(permutation[k:]))
        drafts.add("gptq.eliminate", f"k{k}", {"Hinv": Hinv, "B": B, "R": R}, hidden={"H": H})

    whole = {"W": sixteenths(21, 4, 8, 1000), "C": correlated(22, 8)}
    for label, config in CONFIGS.items():
        drafts.add("ternarize.ternarize", label, whole, block_size=3, **config)
    wider = {"W": sixteenths(126, 3, 12, 1000), "C": correlated(127, 12)}
    for label, config in MORE_CONFIGS.items():
        drafts.add("ternarize.ternarize", label, wider, **{"block_size": 5, **config})

    drafts.add("grids.row_factor", "small", {"W": W})
    drafts.add("grids.row_factor", "wide", {"W": sixteenths(23, 6, 5, 4000)})
    rows = (sixteenths(24, 6, 1) / 4 + 2).astype(np.float16)
    for label, value in (("small", sixteenths(25, 6, 1)), ("large", sixteenths(26, 6, 1, 9000))):
        drafts.add("grids.encode", label, {"value": value, "row": rows})

    x, T = np.rint(sixteenths(31, 3, 8, 64)), trits(32, 4, 8)
    packed = answer(Exact(), "packing.pack_base3", {"trits": T}, {})["packed"]
    for label, size, order in (("ordered", 4, np.arange(8)), ("permuted", 3, permutation)):
        blocks_of = -(-8 // size)
        inputs = {
            "x": x,
            "packed": packed,
            "scale": sixteenths(33, 4, blocks_of).astype(np.float16),
            "shift": sixteenths(34, 4, blocks_of, 4).astype(np.float16),
            "permutation": order,
        }
        drafts.add("matmul.matmul", label, inputs, block_size=size)


def _targets(drafts: Drafts) -> None:
    tokens, m, n = 9, 6, 4
    W, X_hat, Y = sixteenths(41, n, m), sixteenths(42, tokens, m), sixteenths(43, tokens, n, 64)
    h = np.rint(sixteenths(44, tokens, 8, 256))
    lost = {"Y": Y, "W": W, "X_hat": X_hat}
    omega = np.abs(sixteenths(45, tokens, 1)) + 1 / 16
    drafts.add("targets.lost_products", "plain", lost)
    drafts.add("targets.lost_products", "weighted", {**lost, "omega": omega})
    drafts.add("targets.token_weights", "small", {"h": h})
    D, C = sixteenths(46, n, m, 4000), correlated(47, m)
    many_settings: dict[str, dict] = {
        "defaults": {},
        "half": {"strength": 0.5},
        "weak-damping": {"damping": 1 / 128, "strength": 0.75},
    }
    for label, settings in many_settings.items():
        drafts.add("targets.shift_targets", label, {"W": W, "C": C, "D": D}, **settings)


def _whole_rows(drafts: Drafts) -> None:
    n, m = 4, 8
    W, T = sixteenths(101, n, m), trits(102, n, m)
    H = correlated(103, m) + 64 * np.eye(m)
    drafts.add("joint.whole_error", "small", {"W": W, "W_hat": T / 2, "H": H})
    drafts.add("joint.damped_objective", "small", {"C": H}, damping=0.1)
    for size in (3, 4, 8):
        blocks = -(-m // size)
        alpha, mu = sixteenths(104, n, blocks, 8) + 9 / 16, sixteenths(105, n, blocks, 4)
        start = {"W": W, "T": T, "alpha": alpha, "mu": mu, "H": H}
        label = f"blocks-of-{size}"
        drafts.add("joint.spread", label, {"grid": alpha}, columns=m, block_size=size)
        drafts.add("joint.align_jointly", label, start, block_size=size)
        drafts.add("descent.descend", label, start, block_size=size)
        drafts.add("descent.descend", f"{label}-one-sweep", start, block_size=size, sweeps=1)
        drafts.add("refine.refine", label, start, block_size=size)
        drafts.add("refine.refine", f"{label}-one-round", start, block_size=size, rounds=1)
        drafts.add("refine.refine", f"{label}-grid", start, block_size=size, descent=False)
        start = start | {"mu": 0 * mu}
        for operation in ("joint.align_jointly", "refine.refine"):
            drafts.add(operation, f"{label}-symmetric", start, block_size=size, symmetric=True)
    # Rounding fed forward sees only the block's part of the inverse.
    Hinv = inverse(H)
    for k in (1, 3, 7, 8):
        block = {"W": W[:, :k], "alpha": alpha[:, :1], "mu": mu[:, :1], "Hinv": Hinv[:k, :k]}
        drafts.add("feedforward.round_fed_forward", f"k{k}", block, hidden={"H": H})


def _packing(drafts: Drafts) -> None:
    for codec, places, base in (("base3", 5, 3), ("2bit", 4, 4)):
        codes = [c for c in range(base**places) if all(c // base**i % base < 3 for i in range(places))]
        every = np.array(codes, dtype=np.uint8)
        all_trits = np.array(
            [[code // base**i % base - 1 for code in codes for i in range(places)]], dtype=np.int8
        )
        drafts.add(f"packing.pack_{codec}", "every-byte", {"trits": all_trits})
        drafts.add(f"packing.unpack_{codec}", "every-byte", {"packed": every[None]}, count=all_trits.shape[1])
        for m in (1, 3, 4, 5, 6, 11):
            T = np.sign(np.rint(sixteenths(40 + m, 3, m, 24))).astype(np.int8)
            packed = drafts.add(f"packing.pack_{codec}", f"{m}-trits", {"trits": T})["packed"]
            drafts.add(f"packing.unpack_{codec}", f"{m}-trits", {"packed": packed}, count=m)


def _layout(drafts: Drafts) -> None:
    for rows, columns in ((3, 40), (32, 256), (33, 300), (65, 17)):
        drafts.add("layout.lay_words", f"{rows}x{columns}", {"trits": trits(columns, rows, columns)})
    for k in (64, 128, 256, 512, 1024):
        numbers = sixteenths(200 + k, 33, 2 * -(-1100 // k), 2000).reshape(33, -1, 2)
        for kind, grid in (("float16", numbers), ("int8", np.rint(numbers))):
            inputs = {"grid": grid.astype(kind)}
            drafts.add("layout.lay_grid", f"{kind}-{k}", inputs, columns=1100, block_size=k)
    for kind, rows, columns, k in (
        ("float16", 33, 300, 64),
        ("float16", 5, 577, 128),
        ("float16", 3, 700, 256),
        ("float16", 2, 1100, 512),
        ("int8", 33, 300, 64),
        ("int8", 5, 577, 128),
        ("int8", 3, 700, 256),
        ("int8", 2, 1100, 512),
        # Plain grids: other block sizes, and other dtypes.
        ("float16", 3, 300, 96),
        ("int8", 3, 300, 96),
        ("float32", 33, 300, 128),
        ("float64", 3, 300, 128),
    ):
        inputs = matrix(300 + k, rows, columns, k, kind)
        drafts.add("layout.lay_out", f"{kind}-{k}", inputs, block_size=k)
    mixed = matrix(320, 3, 300, 64) | {"shift": sixteenths(321, 3, 5).astype(np.float32)}
    drafts.add("layout.lay_out", "float16-and-float32", mixed, block_size=64)
    for label, kind, k, many_rows in (
        ("three-of-float16", "float16", 128, (33, 1, 40)),
        ("two-of-codes", "int8", 64, (3, 35)),
        ("two-of-plain", "float16", 96, (32, 2)),
        ("one", "float16", 256, (4,)),
    ):
        drafts.add("layout.join", label, joined(330, many_rows, 270, k, kind), block_size=k)


def joined(
    seed: int, many_rows: tuple[int, ...], columns: int, block_size: int = 64, kind: str = "float16"
) -> dict[str, Array]:
    """Draw matrices with these numbers of rows, named as in the cases of `join`."""
    return {
        f"layouts.{part}.{name}": value
        for part, rows in enumerate(many_rows)
        for name, value in matrix(seed + 10 * part, rows, columns, block_size, kind).items()
    }
