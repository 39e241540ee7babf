"""Fit the matrices of a layer side by side, on the threads of a process and in several processes.

Every process fits its own matrices (`calibration.owners`) and sends all others what is stored of them, and
the figures of the fit. So all have the same layer afterwards. Bytes sent for one matrix, to each of the other
processes: its trits as int8, alpha and mu as they are stored, and its permutation as int64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from harness.calibration.grid_range import lost_share
from harness.calibration.methods import FitError
from harness.calibration.owners import Owners
from harness.calibration.passage import WorkingLayer
from harness.calibration.sums import Statistics
from harness.compute import Compute
from reference.aga import output_error
from reference.types import CodedGrid, TernaryMatrix

# Quantizes a matrix, given what is known about its inputs.
Fit = Callable[[torch.Tensor, Statistics], Any]
# Makes an array of the library that fits matrices of a tensor.
Adopt = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class FittedMatrix:
    """One matrix of a layer after quantization.

    Attributes
    ----------
    name : str
        Its name in the whole model.
    weight : (n, m) tensor
        The original.
    result : TernaryMatrix or (n, m) array
        What it is now; for baselines dense.
    seconds : float
        Time of the fit.
    tokens : int
        Inputs that were seen; for a matrix of an expert, those of the tokens routed to it.
    dead_inputs : int
        Inputs that are always 0.
    figures : dict
        The report of the fit; for baselines the error alone.
    lost : float
        Share of blocks whose alpha is too small to be stored.
    gram : (m, m) tensor, optional
        Gram matrix of its inputs; None if another process has fitted it.
    """

    name: str
    weight: torch.Tensor
    result: Any
    seconds: float
    tokens: int
    dead_inputs: int
    figures: dict[str, Any]
    lost: float = 0.0
    gram: Any = None


def fit_matrices(
    layer: WorkingLayer,
    groups: list[list[str]],
    weights: Mapping[str, torch.Tensor],
    known: Mapping[str, Statistics],
    fit_of: Callable[[str], Fit],
    owners: Owners,
    compute: Compute,
    adopt: Adopt,
) -> Iterator[FittedMatrix]:
    """Quantize matrices of a layer, and replace their weights by the dequantized ones.

    Parameters
    ----------
    layer : WorkingLayer
        The layer.
    groups : list of lists of str
        Matrices that share an input; all are fitted at the same time.
    weights : mapping of str to tensor
        The original weights, by their names in the layer: a matrix that is fitted again no longer has them.
    known : mapping of str to Statistics
        What is known about the inputs of this process's matrices, by their names in the layer.
    fit_of : callable
        Returns how the matrix of a full name is quantized.
    owners : dict of str to int
        Rank of the process that fits each matrix.
    compute : Compute
        Device that fits matrices, and the processes.
    adopt : callable
        Makes an array of the library that fits matrices of a tensor that another process has sent.

    Raises
    ------
    FitError
        In all processes, if a matrix cannot be quantized or its inputs are not finite.
    """
    ranks = compute.ranks
    names = [name for group in groups for name in group]
    fitted: dict[str, FittedMatrix] = {}
    failure = None
    try:
        jobs = {}
        for name in (name for name in names if owners[name] == ranks.rank):
            full_name = layer.full_name(name)
            if not torch.isfinite(known[name].gram).all():
                raise FitError(f"{full_name}: its inputs on the calibration text are not finite")
            jobs[name] = (full_name, weights[name], known[name], fit_of(full_name))
        fitted = _quantize_together(jobs, len(names), compute)
    except FitError as error:
        if ranks.size == 1:
            raise
        failure = str(error)
    told = {name: _described(matrix) for name, matrix in fitted.items()} if ranks.size > 1 else {}
    for own in ranks.gather({"failure": failure, "matrices": told}):
        if own["failure"] is not None:
            raise FitError(own["failure"])
        told |= own["matrices"]
    for name in names:
        matrix = fitted.get(name)
        if ranks.size > 1:
            matrix = _exchanged(
                layer.full_name(name), weights[name], matrix, told[name], owners[name], compute, adopt
            )
        assert matrix is not None
        result = matrix.result
        layer.put(
            name, torch.from_dlpack(result.dequantize() if isinstance(result, TernaryMatrix) else result)
        )
        yield matrix


def _quantize_together(
    jobs: dict[str, tuple[str, torch.Tensor, Statistics, Fit]], beside: int, compute: Compute
) -> dict[str, FittedMatrix]:
    """Quantize matrices in parallel, to use all cores.

    Each gets an equal share of the BLAS threads. What its share is depends on all matrices that are fitted at
    this time, in any process, so that rounding does not depend on the number of processes.
    """
    if compute.device.type == "cuda":  # a single matrix saturates the GPU
        return {name: _quantize(*job) for name, job in jobs.items()}
    cores = torch.get_num_threads()
    workers = min(beside, cores)
    # Start the longest fit first; time grows with the cube of the columns.
    order = sorted(jobs, key=lambda name: len(jobs[name][2].gram), reverse=True)
    pool = ThreadPoolExecutor(workers)
    try:
        with threadpool_limits(max(1, cores // workers), "blas"):
            running = {name: pool.submit(_quantize, *jobs[name]) for name in order}
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()  # raise the first failure of any matrix
            return {name: running[name].result() for name in jobs}
    finally:
        # After Ctrl-C or a failure, start no further matrix.
        pool.shutdown(cancel_futures=True)


def _quantize(name: str, weight: torch.Tensor, statistics: Statistics, method: Fit) -> FittedMatrix:
    begin = time.perf_counter()
    try:
        result = method(weight, statistics)
    except ValueError as error:  # numpy's LinAlgError is one
        raise FitError(f"{name}: {error}") from None
    seconds = time.perf_counter() - begin
    gram, lost = statistics.gram, 0.0
    if isinstance(result, TernaryMatrix):
        lost = lost_share(name, weight, gram, result)
    dead = int((gram.diagonal() == 0).sum())
    figures = _figures(weight, gram, result)
    return FittedMatrix(name, weight, result, seconds, statistics.tokens, dead, figures, lost, gram)


def _figures(weight: torch.Tensor, gram: torch.Tensor, result: Any) -> dict[str, Any]:
    """The report of a fit, or only its error where there is none."""
    if isinstance(result, TernaryMatrix) and result.report is not None:
        return asdict(result.report)
    dense = result.dequantize() if isinstance(result, TernaryMatrix) else result
    W, C = (tensor.double().cpu().numpy() for tensor in (weight, gram))
    power = output_error(W, np.zeros_like(W), C)
    error = output_error(W, dense, C)
    return {"output_power": power, "relative_output_error": error / power if power > 0 else 0.0}


def _described(matrix: FittedMatrix) -> dict[str, Any]:
    """What JSON can hold of a matrix, with the dtypes and shapes of its arrays."""
    named = ("seconds", "tokens", "dead_inputs", "figures", "lost")
    return {
        **{name: getattr(matrix, name) for name in named},
        "block_size": getattr(matrix.result, "block_size", 0),
        "arrays": {
            part: [str(array.dtype), list(array.shape)] for part, array in _arrays(matrix.result).items()
        },
    }


def _exchanged(
    name: str,
    weight: torch.Tensor,
    matrix: FittedMatrix | None,
    told: dict[str, Any],
    owner: int,
    compute: Compute,
    adopt: Adopt,
) -> FittedMatrix:
    """Send a matrix to all other processes, or receive it."""
    arrays = {}
    for part, (dtype, shape) in told["arrays"].items():
        if matrix is not None:
            compute.ranks.share_tensor(torch.from_dlpack(_arrays(matrix.result)[part]), owner)
        else:
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device=compute.device)
            arrays[part] = adopt(compute.ranks.share_tensor(empty, owner))
    if matrix is not None:
        return matrix
    result = arrays[""] if "" in arrays else _rebuilt(arrays, told["block_size"])
    named = ("seconds", "tokens", "dead_inputs", "figures", "lost")
    return FittedMatrix(name, weight, result, **{key: told[key] for key in named})


def _arrays(result: Any) -> dict[str, Any]:
    """The arrays of a quantized matrix by name; of a dense one, itself under an empty name."""
    if not isinstance(result, TernaryMatrix):
        return {"": result}
    arrays = {"trits": result.trits, "permutation": result.permutation}
    for part in ("scale", "shift"):
        grid = getattr(result, part)
        if isinstance(grid, CodedGrid):
            arrays |= {f"{part}.{name}": getattr(grid, name) for name in ("codes", "row", "block")}
        elif grid is not None:
            arrays[part] = grid
    return arrays


def _rebuilt(arrays: dict[str, Any], block_size: int) -> TernaryMatrix:
    """The opposite of `_arrays`; the report of the fit is in its figures."""
    grids = {
        part: CodedGrid(*(arrays[f"{part}.{name}"] for name in ("codes", "row", "block")))
        if f"{part}.codes" in arrays
        else arrays.get(part)
        for part in ("scale", "shift")
    }
    return TernaryMatrix(arrays["trits"], grids["scale"], grids["shift"], arrays["permutation"], block_size)
