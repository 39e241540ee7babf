"""Meet the other processes of a run before torch.distributed connects them.

Left alone, it waits for one that never comes as long as for one that computes, in code that Ctrl-C does not
reach. So every process first finds the run's key-value store, signs in there, and looks for the others.
"""

from __future__ import annotations

import ipaddress
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from torch import distributed

from harness.distributed.ranks import EXIT_FAILED
from harness.errors import UserError
from harness.streams import tell

# What torchrun, or whoever starts processes in its way, tells each of them.
REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Seconds until something counts as missing: torch's own for its store. Libraries may come from a slow disk.
LIMIT = 300.0
# Seconds until a process says what it waits for.
NOTICE = 15.0
# Seconds between two looks, and for one attempt to connect.
PERIOD, ATTEMPT = 0.2, 10.0


def numbers() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as the environment tells them.

    Raises
    ------
    UserError
        If the environment speaks of several processes, but not of how to join them.
    """
    size = _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if size < 1:
        raise UserError(f"WORLD_SIZE is {size}, but must be at least 1")
    if size == 1:
        return 0, 1
    missing = [name for name in REQUIRED if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {size}, but there is no {missing[0]}; start processes with torchrun")
    rank = _number("RANK")
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}; ranks are counted from 0")
    port = _number("MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port}, but ports are numbers from 1 to {2**16 - 1}")
    return rank, size


def meet(rank: int, size: int) -> distributed.Store:
    """Return the store of this run once all its processes have signed in there.

    Raises
    ------
    UserError
        If the store cannot be reached, or a process does not come.
    SystemExit
        If it is up to another process to say so.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store_name = f"the key-value store of this run at {host}:{port}"
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _reach(host, port, store_name, f"rank {rank} on {socket.gethostname()}")
    # torchrun's restarts share a store, which holds addresses of processes that are gone.
    attempt = f"harness/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    patience = timedelta(seconds=LIMIT)
    try:
        whole = distributed.TCPStore(host, port, is_master=keeps, timeout=patience, wait_for_workers=False)
        store = distributed.PrefixStore(attempt, whole)
        _sign_in(store, rank, size)
    except (RuntimeError, ValueError) as error:  # a port that is taken; a store that is gone again
        raise UserError(f"{store_name} cannot be used: {first_line(error)}") from None
    return store


def in_time(work: Callable[[], None]) -> None:
    """Do work that may wait for other machines, in a thread: this one hears Ctrl-C meanwhile.

    Raises
    ------
    TimeoutError
        If it takes too long; it goes on until this process ends.
    """
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            work()
        except BaseException as error:  # to be raised where someone waits for it
            results.put(error)
        else:
            results.put(None)

    threading.Thread(target=attempt, name="join", daemon=True).start()
    deadline = time.monotonic() + LIMIT
    while True:
        with suppress(queue.Empty):
            # Not in one wait: a signal may reach another thread, and is handled when this one wakes.
            if (error := results.get(timeout=PERIOD)) is not None:
                raise error
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {LIMIT:.0f} seconds")


def first_line(error: BaseException) -> str:
    """What an error of torch says, without its stack of C++ functions."""
    return str(error).strip().partition("\n")[0]


def _number(name: str) -> int:
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a number, got {value!r}") from None


def _reach(host: str, port: int, store_name: str, who: str) -> None:
    """Wait until the store listens. torch would do that too, with warnings of many lines."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # all processes of a machine see the same
    began, told = time.monotonic(), not speaks
    while True:
        try:
            socket.create_connection((host, port), ATTEMPT).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        waited = time.monotonic() - began
        if waited > LIMIT:
            _end(speaks, f"{store_name} cannot be reached: {reason}")
        if waited > NOTICE and not told:
            told = True
            tell(f"{who} waits for {store_name}: {reason}")
        time.sleep(PERIOD)


def _sign_in(store: distributed.Store, rank: int, size: int) -> None:
    """Wait until all processes have signed in."""
    keys = [f"met/{each}" for each in range(size)]
    store.set(keys[rank], json.dumps([socket.gethostname(), _is_reachable()]))
    missing = set(range(size))
    began, told = time.monotonic(), False
    while True:
        missing -= {each for each in missing if store.check([keys[each]])}
        if not missing:
            break
        speaks = rank == min(set(range(size)) - missing)
        waited = time.monotonic() - began
        if waited > LIMIT:
            _end(speaks, f"{_named(missing)} of {size} did not come; does the command run on every machine?")
        if waited > NOTICE and not told:
            told = True
            if speaks:
                tell(f"waiting for {_named(missing)} of {size}")
        time.sleep(PERIOD)
    _require_reachable([json.loads(text) for text in store.multi_get(keys)], rank)


def _is_reachable() -> bool:
    """Whether other machines can reach gloo, which listens at what this machine's name stands for."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return True
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:  # gloo then takes the loopback address
        return False
    return not all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)


def _require_reachable(signed: list[tuple[str, bool]], rank: int) -> None:
    """Refuse machines that others would look for in themselves; gloo would wait for them."""
    unreachable = [each for each, (_, reachable) in enumerate(signed) if not reachable]
    if len({machine for machine, _ in signed}) > 1 and unreachable:
        machine = signed[unreachable[0]][0]
        _end(
            rank == unreachable[0],
            f"the name of this machine, {machine}, stands for an address that others cannot reach, such as "
            "127.0.1.1; set GLOO_SOCKET_IFNAME on every machine to its network interface, such as eth0",
        )


def _named(ranks: set[int]) -> str:
    first = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank {first}" if len(ranks) == 1 else f"ranks {first}{', ...' if len(ranks) > 8 else ''}"


def _end(speaks: bool, message: str) -> NoReturn:
    if speaks:
        raise UserError(message)
    raise SystemExit(EXIT_FAILED)
