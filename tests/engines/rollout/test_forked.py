"""Servers that are forks of one process: who shares it, how long it lives, what is told of an end."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from rollflow.engines.config import ModelConfig
from rollflow.engines.rollout.fork_finding import connect
from rollflow.engines.rollout.fork_server import HOLDERS, name_of
from rollflow.engines.rollout.forked import UNKNOWN, Forked
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import ServerError, wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from tests.engines.deaths import is_alive

CHEAP = """
import os, signal, sys, threading
from rollflow.engines.rollout import fork_server, launch
def run(arguments):
    os.write(1, b"up\\n")
    sys.exit(arguments["exit"]) if "exit" in arguments else signal.pause()
def load():
    {load}
fork_server.serve(load, lambda arguments: launch.keep(run, arguments))
"""
"""Imports nothing; a server does nothing."""

OWNER = """
import os, signal, sys
from rollflow.engines.rollout.forked import Forked
reads, writes = os.pipe()
server = Forked({}, os.environ, reads, 2, sys.argv[1:])
print(server.pid, flush=True)
signal.pause()
"""


class Owned(Forked):
    """One cheap server, the pipe that keeps it, and the one into which it writes."""

    def __init__(self, command: list[str], **arguments: int) -> None:
        stdin, self.pipe = os.pipe()
        self.output, output = os.pipe()
        self.command = command
        super().__init__(arguments, os.environ, stdin, output, command)
        os.close(stdin)
        os.close(output)

    @property
    def parent(self) -> psutil.Process:
        """The fork server."""
        return psutil.Process(psutil.Process(self.pid).ppid())

    def said(self) -> bytes:
        """Waits until it is up, or has ended."""
        return os.read(self.output, 100)

    def end(self) -> int:
        os.close(self.pipe)
        os.close(self.output)
        return self.wait(30)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a fork server that no other test has, and nobody keeps."""
    monkeypatch.delenv(HOLDERS, raising=False)
    return [sys.executable, "-c", CHEAP.format(load="pass"), str(tmp_path)]


@pytest.fixture
def server(command: list[str]) -> Callable[..., Owned]:
    """Starts a cheap server."""
    return partial(Owned, command)


def gone(*processes: psutil.Process) -> bool:
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not any(map(is_alive, processes))


def test_two_that_start_at_once_share_one_which_ends_with_the_last(server):
    with ThreadPoolExecutor(2) as threads:
        one, two = [f.result() for f in [threads.submit(server) for _ in range(2)]]
    fork_server = one.parent
    assert fork_server == two.parent
    assert one.end() != 0
    assert fork_server.is_running()
    assert server().end() != 0
    assert two.end() != 0
    assert gone(fork_server)
    assert not one.fork_log.exists()


def test_a_fork_server_keeps_nothing_of_its_starter_nor_of_servers(server):
    one = server()
    assert one.said() == b"up\n"
    fork_server = one.parent
    assert os.getsid(fork_server.pid) != os.getsid(0)
    assert fork_server.ppid() != os.getpid()
    pipe = os.fstat(one.pipe).st_ino
    for process, kept in ((fork_server, False), (psutil.Process(one.pid), True)):
        held = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert (f"pipe:[{pipe}]" in held) == kept
        assert any("socket" in name for name in held) != kept
    one.end()


def test_a_server_and_its_fork_server_end_when_the_owner_is_killed(command):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *command], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        guard = psutil.Process(int(owner.stdout.readline()))
        fork_server = psutil.Process(guard.ppid())
        family = [guard, *guard.children(recursive=True)]
        owner.send_signal(signal.SIGKILL)
    assert gone(fork_server, *family)


def test_servers_outlive_a_fork_server_that_is_killed_and_the_next_start_makes_another(server):
    one = server()
    killed = one.parent
    killed.kill()
    assert gone(killed)
    two = server()
    assert two.parent != killed
    assert one.poll() is None
    assert two.end() != UNKNOWN
    assert one.end() == UNKNOWN
    assert one.poll() == UNKNOWN


def test_only_what_the_imports_may_read_makes_another(server, tmp_path, monkeypatch):
    one = server()
    monkeypatch.setenv("ANY_OTHER", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    same = server()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    other = server()
    assert same.parent == one.parent
    assert other.parent != one.parent
    for process in (one, same, other):
        process.end()


def test_an_exit_code_is_told(server):
    one = server(exit=7)
    assert one.pid
    assert one.wait(30) == 7
    assert one.poll() == 7
    assert one.said() == b"up\n"
    assert one.end() == 7


def test_a_fork_server_is_kept_for_a_process_that_asks_for_it(server, monkeypatch):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as holder:
        monkeypatch.setenv(HOLDERS, f"{os.getpid()}-1 {name_of(holder.pid)}")
        one = server()
        fork_server = one.parent
        one.end()
        monkeypatch.delenv(HOLDERS)
        two = server()
        assert two.parent == fork_server
        two.end()
        assert fork_server.is_running()
    assert gone(fork_server)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("raise ImportError('nothing works')", "ImportError: nothing works"),
        ("threading.Thread(target=signal.sigwait, args=[[10]]).start()", "started threads"),
    ],
)
def test_a_fork_server_that_cannot_load_says_why(command, load, said):
    one = Owned([*command[:2], CHEAP.format(load=load), command[3]])
    with pytest.raises(RuntimeError, match="the fork server ended before it made a server"):
        print(one.pid)
    assert one.poll() == UNKNOWN
    assert said in one.fork_log.read_text()
    one.end()


def test_a_fork_server_that_is_given_up_waits_for_the_lock_once_and_lets_it_go(command):
    endless = CHEAP.format(load="[signal.pause() for _ in iter(int, 1)]")
    one = Owned([*command[:2], endless, command[3]])
    folder = os.open(one.fork_log.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    place = f":{os.fstat(folder).st_ino} "
    one.end()

    def waiting() -> list[int]:
        lines = Path("/proc/locks").read_text().splitlines()
        return [int(line.split()[5]) for line in lines if "->" in line and place in line]

    deadline = time.monotonic() + 30
    while not (waits := waiting()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(waits[0], signal.SIGALRM)  # it would look again as soon as it goes on
    os.close(folder)
    assert gone(psutil.Process(waits[0]))


def test_an_odd_request_costs_nobody_else_anything(server):
    one = server()
    assert one.pid
    with connect(os.environ, one.command)[0] as odd:
        odd.send(b"1")
        assert odd.recv(1) == b""
    two = server()
    assert two.parent == one.parent
    assert two.end() != UNKNOWN
    assert one.poll() is None
    assert one.end() != UNKNOWN


def test_an_end_that_a_stopped_fork_server_does_not_tell_is_noticed(server):
    one = server()
    parent = one.parent
    parent.suspend()
    try:
        assert one.end() == UNKNOWN
    finally:
        parent.resume()
    assert gone(parent)


async def test_imports_that_fail_are_reported_with_their_last_words(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('this one is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = OwnedProcess("server", {}, tmp_path / "log", "cpu")
    with pytest.raises(ServerError, match=r"(?s)server ended .*ImportError: this one is broken"):
        await wait_until_up("server", process, "http://127.0.0.1:9/health", 60)
    process.kill()


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import signal\nwhile True: signal.pause()")
    monkeypatch.delenv(HOLDERS, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = OwnedProcess("server", {}, tmp_path / "log", "cpu")
    log = process.log
    with pytest.raises(ServerError, match=rf"server did not answer .*{log}"):
        await wait_until_up("server", process, "http://127.0.0.1:9/health", 0.01)
    process.kill()
    assert process.exit_code == UNKNOWN
    assert process.tail() == ""
    deadline = time.monotonic() + 30
    while log.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="servers with CUDA are no forks")
async def test_real_servers_are_forks_of_one_with_folders_of_their_own(models, tmp_path):
    leases = PortLease(), PortLease()
    processes: list[OwnedProcess] = []
    for lease in leases:
        settings = ModelConfig(path=str(models[0]))
        arguments = server_arguments(settings, {}, "cpu", port=lease.port, seed=0)
        processes.append(OwnedProcess("server", arguments, tmp_path / f"{lease.port}", "cpu"))
    for lease, process in zip(leases, processes, strict=True):
        url = f"http://127.0.0.1:{lease.port}/model_info"
        await wait_until_up("server", process, url, 240)
        lease.release()
    guards = [psutil.Process(process.pid) for process in processes]
    assert guards[0].ppid() == guards[1].ppid()
    servers = [guard.children()[0] for guard in guards]
    assert all("launch server" in " ".join(server.cmdline()) for server in servers)
    for process in processes:
        process.kill()
    assert gone(*guards, *servers)
