"""The device that layers run on, and where hidden states are kept between layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.backends import Backend
from harness.distributed.launch import current
from harness.distributed.ranks import ALONE, Ranks
from harness.errors import UserError

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """A device, with the dtype and memory to use on it, and the processes that share the work.

    Attributes
    ----------
    device : torch.device
        Device that runs the layers and fits the matrices.
    dtype : torch.dtype or None
        dtype that layers run in; None for the dtype of the model.
    memory : int or None
        Bytes of device memory that may be used; None on the host.
    ranks : Ranks
        This process and those that it shares the work with, each on a device of its own.
    """

    device: torch.device = HOST
    # On most CPUs, 16-bit arithmetic is no faster than float32, and it is less exact.
    dtype: torch.dtype | None = torch.float32
    memory: int | None = None
    ranks: Ranks = ALONE

    def alone(self) -> Compute:
        """The same device, for work that every process does as a whole."""
        return replace(self, ranks=ALONE)

    def describe(self) -> str:
        """Name of the device, for people."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def peak_memory(self) -> int:
        """Peak device memory of torch and the backend together, in bytes; 0 on the host."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def wait(self) -> None:
        """Synchronize with the device, so that elapsed time can be measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def queue(self, backend: Backend) -> Iterator[None]:
        """Run the backend on torch's current stream."""
        pointer = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        with backend.on_stream(pointer):
            yield

    def holds(self, model: Any, seqlen: int) -> bool:
        """Whether a whole model fits, with the float32 logits of a window and room to run a layer."""
        if self.memory is None:
            return True
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        return 1.1 * weights + 8 * seqlen * model.config.get_text_config().vocab_size <= self.memory

    def place(self, hidden: list[torch.Tensor], reserved: float) -> list[torch.Tensor]:
        """Move hidden states to the device if they fit beside `reserved` bytes, else pin them on the host."""
        if self.memory is None:
            return hidden
        size = sum(states.numel() * states.element_size() for states in hidden)
        if size + reserved <= self.memory:
            return [states.to(self.device) for states in hidden]
        return [states.pin_memory() for states in hidden]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as in config.json, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def default_compute(limit: int | None = None) -> Compute:
    """Return the current CUDA device if torch has one, else the host.

    Parameters
    ----------
    limit : int, optional
        Bytes of device memory to use at most; by default, all that is free now.
    """
    if not torch.cuda.is_available():
        return Compute(ranks=current())
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        free = min(free, limit)
    return Compute(device, None, free, current())


def compute_for(backend: Backend, limit: int | None = None) -> Compute:
    """Return the device that layers run on for a backend; from then on, torch allocates its memory."""
    if not backend.on_device:
        return Compute(ranks=current())
    compute = default_compute(limit)
    if compute.device == HOST:
        raise UserError(
            f"backend {backend.name} found a CUDA GPU, but this build of torch has no CUDA support; "
            "install a CUDA build of torch, or use --backend reference"
        )
    share_memory(backend)
    return compute


def share_memory(backend: Backend) -> None:
    """Make a backend allocate device memory through torch, so that torch's CUDA graphs track it."""
    if backend.on_device:
        backend.package.use_allocator(torch.cuda.caching_allocator_alloc, _release)


def _release(pointer: int, device: int) -> None:
    torch.cuda.caching_allocator_delete(pointer)


def seconds_of(work: Callable[[], Any], compute: Compute, warm_up: bool = True) -> float:
    """Time `work` on a device, in seconds."""
    if warm_up:  # the first call also allocates, compiles and selects kernels
        work()
    compute.wait()
    begin = time.perf_counter()
    work()
    compute.wait()
    return time.perf_counter() - begin
