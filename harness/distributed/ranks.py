"""The processes that share a run, and what they send each other.

Values travel as JSON, tensors as their bytes; nothing is pickled. What is in the host's memory goes through
gloo, what is on a GPU through NCCL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from harness.errors import LostProcess

# The exit status of a process whose run has failed.
EXIT_FAILED = 2


class Ranks:
    """A process, and the others that share its run.

    Every method but `own`, `send` and `receive` must be called by all processes, in the same order. A process
    that is alone returns what it was given.

    Parameters
    ----------
    rank, size : int
        Number of this process, from 0, and number of processes.

    Attributes
    ----------
    sent : int
        Bytes of tensors that this process has sent, once for every process that received them. Values, a few
        kB a layer, are not counted.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.sent = rank, size, 0

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and speaks for all."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """The part of `count` items in a row that is this process's."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Sequence[int]) -> list[int]:
        """Add up integers of all processes, each by its place; sums wrap around at 64 bits."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64)
        with _heard():
            distributed.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Collect a value that JSON can hold from every process, by rank."""
        if self.size == 1:
            return [value]
        own = _as_bytes(value)
        joined = self.gather_numbers(own)
        return [_from_bytes(part) for part in joined.split(self._lengths(len(own)))]

    def share(self, value: Any, source: int = 0) -> Any:
        """Return the value, which JSON can hold, that one process has."""
        if self.size == 1:
            return value
        own = _as_bytes(value if self.rank == source else None)
        length = self._lengths(len(own))[source]
        data = own if self.rank == source else torch.empty(length, dtype=torch.uint8)
        with _heard():
            distributed.broadcast(data, source)
        return _from_bytes(data)

    def gather_numbers(self, values: torch.Tensor) -> torch.Tensor:
        """Join the vectors of all processes, by rank; each may have its own length."""
        if self.size == 1:
            return values
        lengths = self._lengths(len(values))
        parts = [values.new_empty(max(lengths)) for _ in lengths]
        padded = torch.zeros_like(parts[0])
        padded[: len(values)] = values
        with _heard():
            distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def share_tensor(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Return the tensor that one process has; the others pass one of its shape, dtype and device."""
        if self.size == 1 or not tensor.numel():
            return tensor
        data = tensor.contiguous()
        with _heard():
            distributed.broadcast(data.reshape(-1).view(torch.uint8), source)
        if self.rank == source:
            self.sent += (self.size - 1) * data.nbytes
        return data

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor to one process, which calls `receive`."""
        with _heard():
            distributed.send(tensor.contiguous().reshape(-1).view(torch.uint8), to)
        self.sent += tensor.nbytes

    def receive(self, into: torch.Tensor, source: int) -> torch.Tensor:
        """Receive a tensor that one process sends into a contiguous one, and return it."""
        with _heard():
            distributed.recv(into.reshape(-1).view(torch.uint8), source)
        return into

    def _lengths(self, own: int) -> list[int]:
        return self.total([own if rank == self.rank else 0 for rank in range(self.size)])


ALONE = Ranks()


@contextmanager
def _heard() -> Iterator[None]:
    """Tell errors of a connection from others: another process is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no class of its own
        raise LostProcess(str(error).strip()) from None


def _as_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
