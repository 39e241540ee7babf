"""Degenerate and invalid inputs, with exact answers.

The paper leaves these cases open. The conventions here: equal trits determine no scale (alpha is 0, mu the
mean), a tie |Z| = ½ rounds to 0, a singular Eq. 12 takes the correction of least norm, weights of dead inputs
become 0, zero columns come last, and ties go to the lower index.
"""

from __future__ import annotations

import numpy as np

from golden import beyond
from golden.arithmetic import Array
from golden.cases import Case
from golden.drafts import Drafts
from golden.exact import BEST, correlated, joined, matrix, sixteenths, trits

CONSTANT = [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [-0.25, -0.25, -0.25, -0.25], [1, 0, 0, 0]]


def cases() -> list[Case]:
    """All degenerate cases."""
    drafts = Drafts("degenerate")
    _rows(drafts)
    _grids(drafts)
    _codes(drafts)
    _columns(drafts)
    _gram(drafts)
    beyond.targets(drafts)
    beyond.whole_rows(drafts)
    _whole(drafts)
    _layout(drafts)
    _refused(drafts)
    beyond.refused(drafts)
    return drafts.cases


def _rows(drafts: Drafts) -> None:
    for operation in ("twn.symmetric_ternarize", "atq.ternary_init", "atq.iterative_ternary_fitting"):
        drafts.add(operation, "constant-rows", {"W": CONSTANT}, ties=True)
        drafts.add(operation, "one-column", {"W": [[0.5], [0], [-2]]}, ties=True)
    # No mean holds constant rows; those of zeros have no trits.
    fitting = "atq.iterative_ternary_fitting"
    drafts.add(fitting, "constant-rows-symmetric", {"W": CONSTANT}, ties=True, symmetric=True)
    drafts.add(fitting, "one-column-symmetric", {"W": [[0.5], [0], [-2]]}, ties=True, symmetric=True)
    # The mean magnitude is 4, so the threshold is exactly 3, and the comparison is strict.
    at_threshold = [[3, -3, 5, -5], [3, 3, 5, 5]]
    drafts.add("twn.symmetric_ternarize", "at-threshold", {"W": at_threshold}, ties=True)
    small = 2.0**-18
    above = [[3 + small, 3, 5 - small, 5], [-3 - small, -3 + small, 5, -5]]
    drafts.add("twn.symmetric_ternarize", "just-above-threshold", {"W": above}, ties=True)
    shifted = [[4, -2, 6, -4], [3, -3, 5, -5]]
    drafts.add("atq.ternary_init", "at-threshold", {"W": shifted}, ties=True)
    on_grid = [[1, 3, 5, 1, 3, 5], [-2, -2, -2, 7, 7, 7], [0, 0, 1, 0, 0, 0]]
    drafts.add("atq.iterative_ternary_fitting", "already-ternary", {"W": on_grid})

    W = sixteenths(51, 3, 6)
    equal = np.array([[0] * 6, [1] * 6, [-1] * 6], dtype=np.int8)
    drafts.add("atq.build_optimal_grid", "equal-trits", {"W": W, "T": equal})
    drafts.add("atq.build_optimal_grid", "equal-trits-symmetric", {"W": W, "T": equal}, symmetric=True)
    tenths = {"W": np.full((3, 6), 0.1), "T": equal}
    drafts.add("atq.build_optimal_grid", "constant-not-binary", tenths)
    drafts.add("atq.build_optimal_grid", "one-column", {"W": W[:, :1], "T": equal[:, :1]})
    large_mean = W / 16 + 4096
    drafts.add("atq.build_optimal_grid", "large-mean", {"W": large_mean, "T": trits(52, 3, 6)})


def _grids(drafts: Drafts) -> None:
    W = np.array([[-1.5, -0.5, -0.25, 0, 0.5, 0.75, 1.5]] * 6)
    alpha = [[1], [-1], [0.5], [-0.5], [0], [3]]
    drafts.add("atq.flexible_round", "ties", {"W": W, "alpha": alpha, "mu": np.zeros((6, 1))}, ties=True)
    mu = [[0.25], [-0.5], [0], [1], [0.5], [-1.5]]
    drafts.add("atq.flexible_round", "ties-shifted", {"W": W, "alpha": alpha, "mu": mu}, ties=True)
    tiny = {"W": [[1, -1, 0], [2.0**-1070, 0, -1]], "alpha": [[2.0**-1060], [2.0**-1060]]}
    drafts.add("atq.flexible_round", "tiny-alpha", {**tiny, "mu": [[0], [0]]})
    minus = {"W": sixteenths(53, 3, 5), "alpha": [[-0.5], [0], [-3]], "mu": [[0], [0.25], [-1]]}
    T = trits(54, 3, 5)
    drafts.add("atq.weight_error", "alpha-negative", {**minus, "T": T})
    drafts.add("atq.weight_error_gradient", "alpha-negative", {**minus, "T": T})

    W5 = sixteenths(55, 4, 5)
    equal = np.array([[0] * 5, [1] * 5, [-1] * 5, [1, -1, 0, 1, 0]], dtype=np.int8)
    v = np.array([1.0, 2, -1, 3, 1])
    matrices = {
        "equal-trits": correlated(56, 5),
        "rank-1": np.outer(v, v),
        "rank-2": correlated(57, 5, tokens=2),
        "zero-gram": np.zeros((5, 5)),
        "dead-inputs": beyond.with_dead(correlated(58, 5), [1, 3]),
    }
    for label, C in matrices.items():
        drafts.add("aga.align_grid", label, {"W": W5, "T": equal, "C": C})
        drafts.add("aga.align_grid", f"{label}-symmetric", {"W": W5, "T": equal, "C": C}, symmetric=True)
        drafts.add("aga.output_error", label, {"W": W5, "W_hat": equal / 2, "C": C})
    # The smaller eigenvalue must not be dropped at a ratio of 1e4.
    nearly = {"W": W5[:, :4], "T": np.array([[1, 1, -1, -1]] * 4, dtype=np.int8)}
    drafts.add("aga.align_grid", "nearly-singular", {**nearly, "C": np.diag([1, 3, 2.0**-12, 3 * 2.0**-12])})
    # Here the correction makes alpha negative.
    drafts.add(
        "aga.align_grid", "alpha-negative", {"W": -W5, "T": np.sign(W5).astype(np.int8), "C": np.eye(5)}
    )
    drafts.add("aga.output_error", "no-error", {"W": W5, "W_hat": W5, "C": correlated(56, 5)})
    # Negative row sums of C: for the third row, the objective of Eq. 13 as printed has no lower bound.
    C = np.array([[9.0, -6, 0, 0, 0], [-6, 5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, 3]])
    inputs = {"W": W5, "T": trits(59, 4, 5), "C": C}
    drafts.add("aga.align_grid_printed", "negative-row-sums", inputs)
    drafts.add("aga.align_grid", "negative-row-sums", inputs)
    for label in ("equal-trits", "zero-gram"):
        why = "The denominator is 0: Eq. 9 stays"
        drafts.add("aga.align_grid_printed", label, {"W": W5, "T": equal, "C": matrices[label]}, why=why)


def _codes(drafts: Drafts) -> None:
    rows = np.array([[1], [0.5], [0], [2]], dtype=np.float16)
    drafts.add("grids.row_factor", "zero-row", {"W": [[3, 4, 0, 0], [0, 0, 0, 0], [-2, 2, 2, -2]]}, ties=True)
    drafts.add("grids.row_factor", "tiny", {"W": [[2.0**-23, 2.0**-23], [2.0**-30, 0]]})
    # The factor is exactly 1; halves round to the even code.
    ties = [[127], [1.25], [5], [-5]]
    drafts.add("grids.encode", "ties", {"value": ties, "row": rows}, ties=True)
    drafts.add("grids.encode", "all-zero", {"value": np.zeros((4, 1)), "row": rows}, ties=True)
    # So small that float16 rounds the factor down by a third, and codes are clipped.
    small = 127 * 1.4 * 2.0**-24
    drafts.add("grids.encode", "cut-off", {"value": [[small], [small / 8], [0], [-small]], "row": rows})
    drafts.add("grids.encode", "vanishing", {"value": [[2.0**-20], [0], [0], [0]], "row": rows})


def _columns(drafts: Drafts) -> None:
    # Columns of four ±1 have norm 2: equal cosines are bit-identical.
    signs = np.array([[1, 1, -1, 1, 0, 1, -1, 0], [1, 1, 1, 1, 0, -1, 1, 0]] * 2, dtype=np.float64)
    drafts.add("ssr.cosine_similarity", "zero-columns", {"W": signs})
    for k in (1, 3, 6, 7, 8, 20):
        drafts.add("ssr.select_block", f"ties-and-zeros-k{k}", {"W": signs}, k=k, ties=True)
    many = np.where(sixteenths(60, 4, 64) > 0, 1.0, -1.0)
    for k in (4, 12, 26, 60):
        drafts.add("ssr.select_block", f"many-ties-k{k}", {"W": many}, k=k, ties=True)
    cancel = np.array([[1.0, -1, 1, -1], [1, -1, -1, 1]])
    drafts.add("ssr.select_block", "columns-cancel", {"W": cancel}, k=2, ties=True)
    drafts.add("ssr.select_block", "all-zero", {"W": np.zeros((2, 4))}, k=3, ties=True)
    drafts.add("ssr.select_block", "one-row", {"W": [[-3, 4, 0.5, 0, -1]]}, k=2, ties=True)
    W = sixteenths(61, 3, 5)
    drafts.add("ssr.block_variance", "one-block", {"W": W}, block_size=9)
    drafts.add("ssr.block_variance", "single-columns", {"W": W}, block_size=1)
    drafts.add("ssr.permute", "identity", {"A": W, "permutation": np.arange(5)})
    drafts.add("ssr.permute", "one-column", {"A": W[:, :1], "permutation": np.arange(1)})


def _gram(drafts: Drafts) -> None:
    drafts.add("gptq.gram", "one-token", {"X": [[1, -2, 0, 3]]})
    drafts.add("gptq.gram", "dead-input", {"X": [[1, 0, 2], [-3, 0, 4]]})
    C = correlated(62, 5)
    drafts.add("gptq.damp", "no-damping", {"C": C}, damping=0.0)
    drafts.add("gptq.damp", "zero-gram", {"C": np.zeros((3, 3))}, damping=0.25)
    dead = beyond.with_dead(C, [0, 3])
    drafts.add("gptq.invert_damped", "dead-inputs", {"C": dead}, damping=0.25)
    drafts.add("gptq.invert_damped", "all-dead", {"C": np.zeros((3, 3))}, damping=0.25)
    drafts.add("gptq.invert_damped", "rank-deficient", {"C": correlated(63, 5, tokens=2)}, damping=0.25)
    # The smaller eigenvalue is -1/16: a damping of 1/128 is too small, ten times as much suffices.
    indefinite = [[1, 1.0625], [1.0625, 1]]
    drafts.add("gptq.invert_damped", "damping-raised", {"C": indefinite}, damping=1 / 128)
    H = np.diag([1.0, 2, 4, 8])
    Hinv = np.diag([1, 0.5, 0.25, 0.125])
    W = sixteenths(64, 3, 4)
    blocks = {"Hinv_BB": Hinv[:2, :2], "Hinv_BR": Hinv[:2, 2:]}
    why = "Uncorrelated inputs: nothing can be made good"
    drafts.add(
        "gptq.compensate", "uncoupled", {"W_R": W[:, 2:], "E": W[:, :2], **blocks}, hidden={"H": H}, why=why
    )
    ends = {"B": np.array([1, 3]), "R": np.array([0, 2])}
    drafts.add("gptq.eliminate", "uncoupled", {"Hinv": Hinv, **ends}, hidden={"H": H})


def _whole(drafts: Drafts) -> None:
    W, C = sixteenths(71, 3, 10, 1000), correlated(72, 10)
    constant = np.vstack([W[:1], np.full((1, 10), 0.5), np.zeros((1, 10))])
    zero_columns = W.copy()
    zero_columns[:, [1, 4]] = 0
    matrices: dict[str, tuple[Array, Array, dict]] = {
        "constant-rows": (constant, C, {"block_size": 6}),
        "zero-matrix": (np.zeros((2, 5)), correlated(73, 5), {"block_size": 3}),
        "one-column": (W[:, :1], C[:1, :1], {}),
        "one-row": (W[:1], C, {"block_size": 6, "reorder": "none"}),
        "block-wider-than-matrix": (W, C, {}),
        "blocks-of-one": (W, C, {"block_size": 1, "reorder": "none"}),
        "constant-rows-int8": (constant, C, {"block_size": 6, "grid": "int8"}),
        "dead-inputs-int8": (W, beyond.with_dead(C, [0, 5]), {"block_size": 6, "grid": "int8"}),
        "symmetric-constant-rows": (constant, C, {"block_size": 6, "shift": "none"}),
        "symmetric-dead-inputs": (W, beyond.with_dead(C, [0, 5]), {"block_size": 6, "shift": "none"}),
        "zero-columns": (zero_columns, C, {"block_size": 6}),
        "dead-inputs": (W, beyond.with_dead(C, [0, 5]), {"block_size": 6}),
        "dead-inputs-conditional": (W, beyond.with_dead(C, [0, 5]), {"block_size": 6, "aga": "conditional"}),
        "all-dead": (W, np.zeros((10, 10)), {"block_size": 6}),
        "rank-deficient": (W, correlated(74, 10, tokens=4), {"block_size": 6}),
        "equal-diagonal": (
            sixteenths(94, 2, 40, 1000),
            np.diag([1.0, 2] * 20),
            {"block_size": 6, "reorder": "hessian", "compensation": False},
        ),
        "damping-raised": (W[:, :2], np.array([[1, 1.0625], [1.0625, 1]]), {"damping": 1 / 128}),
        "best-zero-matrix": (np.zeros((2, 5)), correlated(73, 5), {**BEST, "block_size": 3}),
        "best-one-column": (W[:, :1], C[:1, :1], BEST),
        "best-one-row": (W[:1], C, {**BEST, "block_size": 6}),
        "best-block-wider-than-matrix": (W, C, BEST),
        "best-blocks-of-one": (W, C, {**BEST, "block_size": 1}),
        "best-dead-inputs": (W, beyond.with_dead(C, [0, 5]), {**BEST, "block_size": 6}),
        "best-dead-inputs-int8": (W, beyond.with_dead(C, [0, 5]), {**BEST, "block_size": 6, "grid": "int8"}),
        "best-all-dead": (W, np.zeros((10, 10)), {**BEST, "block_size": 6}),
        "best-symmetric-all-dead": (W, np.zeros((10, 10)), {**BEST, "block_size": 6, "shift": "none"}),
        "best-symmetric-zero-matrix": (
            np.zeros((2, 5)),
            correlated(73, 5),
            {**BEST, "block_size": 3, "shift": "none", "grid": "int8"},
        ),
        "best-rank-deficient": (W, correlated(74, 10, tokens=4), {**BEST, "block_size": 6}),
        "best-damping-raised": (
            W[:, :2],
            np.array([[1, 1.0625], [1.0625, 1]]),
            {**BEST, "damping": 1 / 128},
        ),
    }
    # Rows of equal or zero weights: no rounding occurs before these ties.
    tied = ("constant-rows", "constant-rows-int8", "zero-matrix", "one-column", "blocks-of-one", "all-dead")
    for label, (w, c, config) in matrices.items():
        drafts.add("ternarize.ternarize", label, {"W": w, "C": c}, ties=label.endswith(tied), **config)

    inputs = {
        "x": sixteenths(75, 2, 6),
        "packed": np.array([[113, 122], [121, 120]], dtype=np.uint8),
        "scale": np.array([[0, 0.5], [-1, 0]], dtype=np.float16),
        "shift": np.array([[0, 0], [0.25, -2]], dtype=np.float16),
        "permutation": np.array([5, 0, 1, 4, 2, 3]),
    }
    drafts.add("matmul.matmul", "zero-scale", inputs, block_size=4)
    for codec in ("base3", "2bit"):
        none = {"trits": np.zeros((2, 0), dtype=np.int8)}
        packed = drafts.add(f"packing.pack_{codec}", "no-trits", none)["packed"]
        drafts.add(f"packing.unpack_{codec}", "no-trits", {"packed": packed}, count=0)


def _layout(drafts: Drafts) -> None:
    for t in (-1, 0, 1):
        drafts.add("layout.lay_words", f"one-trit-{t}", {"trits": np.array([[t]], dtype=np.int8)})
    one = {"grid": np.array([[[1, -1]]], dtype=np.float16)}
    drafts.add("layout.lay_grid", "one-column", one, columns=1, block_size=128)
    # The second block begins with the last column.
    two = {"grid": np.array([[[1, -1], [2, -2]]], dtype=np.float16)}
    drafts.add("layout.lay_grid", "one-column-in-a-block", two, columns=1025, block_size=1024)
    single = {
        "packed": np.array([[122]], dtype=np.uint8),
        "scale": np.array([[0.5]], dtype=np.float16),
        "shift": np.array([[-0.0]], dtype=np.float16),
        "permutation": np.array([0]),
    }
    drafts.add("layout.lay_out", "one-weight", single, block_size=64)
    drafts.add("layout.lay_out", "blocks-of-one", matrix(91, 2, 3, 1), block_size=1)
    drafts.add("layout.lay_out", "block-wider-than-matrix", matrix(92, 2, 70, 2048), block_size=2048)
    drafts.add("layout.lay_out", "zero-codes", matrix(93, 2, 3, 64, "int8") | _zero_codes(), block_size=64)
    for label, mu in (("largest", 5504), ("beyond", -5536)):
        grid = {"scale": np.array([[-60000]], np.float16), "shift": np.array([[mu]], np.float16)}
        drafts.add("layout.lay_out", f"{label}-in-float16", single | grid, block_size=64)
    whole = joined(95, (1, 1), 5)
    beyond = {f"layouts.1.{name}": np.array([[-60000]], np.float16) for name in ("scale", "shift")}
    drafts.add("layout.join", "one-beyond-float16", whole | beyond, block_size=64)


def _zero_codes() -> dict[str, Array]:
    none: dict[str, Array] = {"codes": np.zeros((2, 1), np.int8), "block": np.zeros((1, 1), np.float16)}
    return {f"{name}.{part}": value for name in ("scale", "shift") for part, value in none.items()}


def _refused(drafts: Drafts) -> None:
    W, C = sixteenths(81, 2, 3), correlated(82, 3)
    T = trits(83, 2, 3)
    nan, infinite = W.copy(), W.copy()
    nan[1, 2], infinite[0, 0] = np.nan, np.inf
    skew, negative = C.copy(), C.copy()
    skew[0, 1] += C.max()
    negative[1, 1] = -1
    refuse = drafts.refuse
    refuse("twn.symmetric_ternarize", "nan", {"W": nan}, "ValueError")
    refuse("atq.ternary_init", "infinity", {"W": infinite}, "ValueError")
    refuse("atq.build_optimal_grid", "not-a-trit", {"W": W, "T": 2 * T}, "ValueError")
    refuse("atq.build_optimal_grid", "shape", {"W": W, "T": T[:, :2]}, "ValueError")
    shifted = {"W": W, "start.alpha": [[1], [1]], "start.mu": [[0], [0.5]], "start.T": T}
    refuse("atq.iterative_ternary_fitting", "symmetric-from-a-shift", shifted, "ValueError", symmetric=True)
    refuse("atq.flexible_round", "shape", {"W": W, "alpha": [[1]], "mu": [[0], [0]]}, "ValueError")
    for label, gram in (("not-symmetric", skew), ("negative-diagonal", negative), ("shape", C[:2, :2])):
        refuse("aga.align_grid", label, {"W": W, "T": T, "C": gram}, "ValueError")
        refuse("ternarize.ternarize", label, {"W": W, "C": gram}, "ValueError")
    refuse("gptq.gram", "nan", {"X": nan}, "ValueError")
    refuse("gptq.damp", "negative-damping", {"C": C}, "ValueError", damping=-0.5)
    singular = np.ones((3, 3))
    refuse("gptq.invert_damped", "singular-undamped", {"C": singular}, "LinAlgError", damping=0.0)
    refuse("ternarize.ternarize", "singular-undamped", {"W": W, "C": singular}, "LinAlgError", damping=0.0)
    refuse("ternarize.ternarize", "nan", {"W": nan, "C": C}, "ValueError")
    refuse("ternarize.ternarize", "beyond-float16", {"W": W * 2.0**20, "C": C}, "ValueError")
    refuse("ternarize.ternarize", "beyond-8-bits", {"W": W * 2.0**20, "C": C}, "ValueError", grid="int8")
    refuse("grids.row_factor", "beyond-float16", {"W": W * 2.0**20}, "ValueError")
    ones = np.ones((2, 1), dtype=np.float16)
    refuse("grids.encode", "beyond-float16", {"value": [[0], [2.0**24]], "row": ones}, "ValueError")
    refuse("grids.encode", "nan", {"value": [[0], [np.nan]], "row": ones}, "ValueError")
    refuse("ssr.permute", "not-a-permutation", {"A": W, "permutation": np.array([0, 0, 1])}, "ValueError")
    refuse("ssr.select_block", "k0", {"W": W}, "ValueError", k=0)
    product = {
        "x": W,
        "packed": np.full((2, 1), 121, dtype=np.uint8),
        "scale": np.ones((2, 1), dtype=np.float16),
        "shift": np.ones((2, 1), dtype=np.float16),
        "permutation": np.array([0, 2, 1]),
    }
    twice, bad_byte = np.array([0, 0, 1]), np.full((2, 1), 250, dtype=np.uint8)
    refuse(
        "matmul.matmul", "not-a-permutation", {**product, "permutation": twice}, "ValueError", block_size=3
    )
    refuse("matmul.matmul", "no-code", {**product, "packed": bad_byte}, "ValueError", block_size=3)
    _refused_layouts(drafts)
    for codec, byte, filling in (("base3", 243, 0), ("2bit", 3, 0)):
        bad = np.array([[byte]], dtype=np.uint8)
        places = 5 if codec == "base3" else 4
        refuse(f"packing.unpack_{codec}", "no-code", {"packed": bad}, "ValueError", count=places)
        other = np.array([[filling]], dtype=np.uint8)
        refuse(f"packing.unpack_{codec}", "other-filling", {"packed": other}, "ValueError", count=1)
        refuse(f"packing.unpack_{codec}", "length", {"packed": other}, "ValueError", count=places + 1)
        refuse(f"packing.pack_{codec}", "not-a-trit", {"trits": 2 * T}, "ValueError")


def _refused_layouts(drafts: Drafts) -> None:
    refuse = drafts.refuse
    for label, trits_of in (("not-a-trit", [[0, 2]]), ("half-a-trit", [[0.5]]), ("no-matrix", [0, 1])):
        refuse("layout.lay_words", label, {"trits": np.array(trits_of)}, "ValueError")
    grid = {"grid": np.ones((2, 3, 2), dtype=np.float16)}
    refuse("layout.lay_grid", "blocks-of-96", grid, "ValueError", columns=280, block_size=96)
    refuse("layout.lay_grid", "shape", grid, "ValueError", columns=193, block_size=64)
    wide = {"grid": np.ones((2, 3, 2), dtype=np.float32)}
    refuse("layout.lay_grid", "float32", wide, "ValueError", columns=192, block_size=64)
    given, coded = matrix(96, 2, 70, 64), matrix(96, 2, 70, 64, "int8")
    changes: dict[str, dict[str, Array]] = {
        "not-a-permutation": {"permutation": np.zeros(70, dtype=int)},
        "no-code": {"packed": np.full((2, 14), 243, dtype=np.uint8)},
        "shape": {"scale": given["scale"][:, :1]},
        "nan": {"shift": np.full((2, 2), np.nan, dtype=np.float16)},
    }
    for label, change in changes.items():
        refuse("layout.lay_out", label, given | change, "ValueError", block_size=64)
    refuse("layout.lay_out", "blocks-of-none", given, "ValueError", block_size=0)
    changes = {
        "other-rows": {"shift.row": 2 * coded["shift.row"]},
        "one-factor": {"scale.row": coded["scale.row"][:1], "shift.row": coded["shift.row"][:1]},
        "wide-factors": {"scale.block": coded["scale.block"].astype(np.float32)},
    }
    for label, change in changes.items():
        refuse("layout.lay_out", label, coded | change, "ValueError", block_size=64)
    refuse(
        "layout.join", "four-parts", joined(97, (1, 2, 3, 4), 5, 64, "float16"), "ValueError", block_size=64
    )
    other = {name.replace(".0.", ".1."): value for name, value in joined(98, (1,), 6).items()}
    refuse("layout.join", "other-columns", joined(97, (1,), 5) | other, "ValueError", block_size=64)
