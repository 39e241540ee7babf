"""Where layers run, and where hidden states wait between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from harness.backends import Backend
from harness.errors import UserError

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """A device, and how layers run on it.

    Attributes
    ----------
    device : torch.device
        Where layers run and matrices are fitted.
    dtype : torch.dtype or None
        What layers run in; None is what the model is stored in.
    memory : int or None
        Bytes of the device that may be used; None for the host.
    """

    device: torch.device = HOST
    # 16-bit arithmetic is as slow as float32 or slower on most CPUs, and less exact.
    dtype: torch.dtype | None = torch.float32
    memory: int | None = None

    def describe(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def peak_memory(self) -> int:
        """Most bytes of the device that torch and the backend have had at a time; 0 for the host."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def wait(self) -> None:
        """Return once the device has done all that is queued, so that clocks can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def queue(self, backend: Backend) -> Iterator[None]:
        """Let the backend work on torch's current stream."""
        pointer = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        with backend.on_stream(pointer):
            yield

    def holds(self, model: Any, seqlen: int) -> bool:
        """Whether a whole model fits, with the logits of a window in float32 and room for a layer to run."""
        if self.memory is None:
            return True
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        return 1.1 * weights + 8 * seqlen * model.config.get_text_config().vocab_size <= self.memory

    def place(self, hidden: list[torch.Tensor], reserved: float) -> list[torch.Tensor]:
        """Hidden states on the device if they fit beside `reserved` bytes, else in pinned host memory."""
        if self.memory is None:
            return hidden
        size = sum(states.numel() * states.element_size() for states in hidden)
        if size + reserved <= self.memory:
            return [states.to(self.device) for states in hidden]
        return [states.pin_memory() for states in hidden]


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def default_compute(limit: int | None = None) -> Compute:
    """The current CUDA device if torch has one, else the host.

    Parameters
    ----------
    limit : int, optional
        Most bytes of the device to use; what is free now if left out.
    """
    if not torch.cuda.is_available():
        return Compute()
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        free = min(free, limit)
    return Compute(device, None, free)


def compute_for(backend: Backend, limit: int | None = None) -> Compute:
    """Where layers run for a backend: on its device, whose memory it takes from torch from here on."""
    if not backend.on_device:
        return Compute()
    compute = default_compute(limit)
    if compute.device == HOST:
        raise UserError(
            f"backend {backend.name} has a CUDA device, but this torch is built without CUDA: "
            "install a CUDA build of torch, or use --backend reference"
        )
    share_memory(backend)
    return compute


def share_memory(backend: Backend) -> None:
    """Let a backend take the memory of its device from torch, whose CUDA graphs know what is theirs."""
    if backend.on_device:
        backend.package.use_allocator(torch.cuda.caching_allocator_alloc, _release)


def _release(pointer: int, device: int) -> None:
    torch.cuda.caching_allocator_delete(pointer)


def seconds_of(work: Callable[[], Any], compute: Compute, warm_up: bool = True) -> float:
    """Seconds that work takes on a device."""
    if warm_up:  # the first time also allocates, compiles and picks kernels
        work()
    compute.wait()
    begin = time.perf_counter()
    work()
    compute.wait()
    return time.perf_counter() - begin
