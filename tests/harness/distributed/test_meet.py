"""Processes of a run that do not find each other, or lose what they met by."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from threading import Lock, Timer

import pytest
from torch import distributed

from harness.distributed import meet, watch
from harness.distributed.ranks import EXIT_FAILED, Ranks
from harness.errors import UserError
from tests.harness.distributed.processes import end, forked

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes wait as long as this one would."""
    monkeypatch.setattr(meet, "LIMIT", 3.0)
    monkeypatch.setattr(meet, "NOTICE", 1.0)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """As what a shell starts in the background, as it may these tests, does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def taken_port() -> Iterator[str]:
    """A port at which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield str(taken.getsockname()[1])


def nothing(ranks: Ranks) -> None:
    raise AssertionError("they have met")


def said(capfd: Capture) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line]


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a number, got ''"),
        ({"RANK": None}, "there is no RANK; start processes with torchrun"),
        ({"MASTER_ADDR": ""}, "there is no MASTER_ADDR"),
        ({"MASTER_PORT": None}, "there is no MASTER_PORT"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2; ranks are counted from 0"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, but must be at least 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, but ports are numbers from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"RANK": "one"}, "RANK must be a number, got 'one'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a number, got 'http'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_environment_that_says_half_is_refused(
    environment: dict[str, str | None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in (whole | environment).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=what):
        meet.numbers()


@pytest.mark.usefixtures("impatient")
def test_a_store_out_of_reach_is_told_once_for_a_machine(taken_port: str, capfd: Capture) -> None:
    with forked(3, nothing, MASTER_PORT=taken_port) as processes:
        end(processes, 60)
    store = f"the key-value store of this run at 127.0.0.1:{taken_port}"
    assert said(capfd) == [
        f"rank 0 on {socket.gethostname()} waits for {store}: Connection refused",
        f"error: {store} cannot be reached: Connection refused",
    ]
    assert processes[0].exitcode == EXIT_FAILED


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("size", "missing"), [(3, "rank 2"), (12, "ranks 2, 3, 4, 5, 6, 7, 8, 9, ...")])
def test_processes_that_do_not_come_are_named_once(
    size: int, missing: str, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither comes while the other has waited for a while: machines may be busy.
    barrier = get_context("fork").Barrier(2)
    monkeypatch.setattr(meet, "_reach", lambda *rest: barrier.wait(60))
    with forked(2, nothing, WORLD_SIZE=str(size)) as processes:
        end(processes, 60)
    assert said(capfd) == [
        f"waiting for {missing} of {size}",
        f"error: {missing} of {size} did not come; does the command run on every machine?",
    ]


def test_a_store_that_another_program_keeps_from_listening_is_said(taken_port: str, capfd: Capture) -> None:
    with forked(
        1, nothing, WORLD_SIZE="2", MASTER_PORT=taken_port, TORCHELASTIC_USE_AGENT_STORE="False"
    ) as processes:
        end(processes, 60)
    (line,) = said(capfd)
    assert line.startswith(f"error: the key-value store of this run at 127.0.0.1:{taken_port} cannot be used")
    assert "EADDRINUSE" in line


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_a_process_that_waits_for_others(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "LIMIT", 3600.0)
    monkeypatch.setattr(meet, "NOTICE", 0.0)
    with forked(1, nothing, WORLD_SIZE="2") as processes:
        lines: list[str] = []
        while not lines:
            lines = said(capfd)
            time.sleep(0.05)
        os.kill(processes[0].pid, signal.SIGINT)
        end(processes, 30)
    assert lines == ["waiting for rank 1 of 2"]
    assert said(capfd) == ["interrupted"]
    assert processes[0].exitcode == 130


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_a_process_whose_connections_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in torch's C++ does not hear it; here, a lock that nobody releases."""
    held = Lock()
    held.acquire()
    monkeypatch.setattr(meet, "LIMIT", 60.0)
    began = time.monotonic()
    Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        meet.in_time(held.acquire)
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("impatient")
def test_connections_that_hang_or_fail_are_errors_here() -> None:
    held = Lock()
    held.acquire()
    with pytest.raises(TimeoutError, match="more than 3 seconds"):
        meet.in_time(held.acquire)
    with pytest.raises(RuntimeError, match="unlocked"):
        meet.in_time(Lock().release)


SIGNED = [("a", True), ("a", True), ("b", False), ("b", False)]


def test_machines_that_cannot_be_reached_by_their_names_are_refused_once() -> None:
    for rank in (0, 1, 3):
        with pytest.raises(SystemExit):
            meet._require_reachable(SIGNED, rank)
    with pytest.raises(UserError, match=r"the name of this machine, b, .* set GLOO_SOCKET_IFNAME"):
        meet._require_reachable(SIGNED, 2)
    # Of one machine, loopback addresses will do.
    meet._require_reachable([("b", False)] * 2, 0)
    meet._require_reachable([("a", True), ("b", True)], 0)


@pytest.mark.parametrize(
    ("addresses", "interface", "reachable"),
    [
        (["127.0.1.1"], "", False),
        (["::1", "127.0.1.1"], "", False),
        (["127.0.1.1", "10.0.0.7"], "", True),
        (["fe80::1%3"], "", True),
        (None, "", False),
        (["127.0.1.1"], "eth0", True),
    ],
)
def test_a_name_leads_others_here_unless_it_is_for_this_machine_alone(
    addresses: list[str] | None, interface: str, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, port: None) -> list[object]:
        assert name == socket.gethostname()
        if addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert meet._is_reachable() is reachable


@pytest.mark.parametrize("with_its_processes", [False, True])
def test_the_end_of_the_process_that_keeps_the_store_is_told_once(
    with_its_processes: bool, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when torchrun is killed on one of two machines, and what it has started goes on or not."""
    monkeypatch.setattr(watch, "SILENCE", 3.0)
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def keep() -> None:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        theirs.send(store.port)
        time.sleep(600)

    def work(ranks: Ranks) -> None:
        if ranks.first:
            os.kill(keeper.pid or 0, signal.SIGKILL)
        elif with_its_processes:
            os.kill(os.getpid(), signal.SIGKILL)
        if with_its_processes:
            ranks.total([0])
        time.sleep(600)

    keeper = context.Process(target=keep, daemon=True)
    keeper.start()
    port = str(ours.recv())
    with forked(2, work, MASTER_PORT=port) as processes:
        end(processes, 60)
    (line,) = [line for line in said(capfd) if "error" in line]
    assert f"keeps its store at 127.0.0.1:{port}, has ended; finished layers are kept" in line


def test_torchrun_may_start_all_processes_again(capfd: Capture) -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def die(ranks: Ranks) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work(ranks: Ranks) -> None:
        assert ranks.gather(ranks.rank) == [0, 1]

    for attempt, (doing, status) in enumerate([(die, -signal.SIGKILL), (work, 0)]):
        told = {"MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        with forked(2, doing, **told) as processes:
            end(processes, 60)
        assert [process.exitcode for process in processes] == [status] * 2


def test_a_usage_error_is_told_although_another_process_has_ended_before(capfd: Capture) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.first:
            time.sleep(1)
            print("error: no such option", file=sys.stderr)
        raise SystemExit(EXIT_FAILED)

    with forked(3, work) as processes:
        end(processes, 30)
    assert said(capfd) == ["error: no such option"]
    assert processes[0].exitcode == EXIT_FAILED
