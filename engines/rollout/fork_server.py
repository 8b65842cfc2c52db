"""The fork server's side: it has SGLang imported, and each server that it is asked for is a fork of it.

:mod:`.fork_finding` makes it, :mod:`.forked` asks it. It has one thread and has computed nothing, so that a fork is as
good as a process that did the imports itself. It ends once nobody uses it: each owner of a server has
a connection to it, and requests may name processes for whose life it is kept, see
:func:`.forked.hold`. Servers outlive it; it alone is their parent and tells how they ended.
"""

import array
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

HOLDERS = "ROLLFLOW_FORK_SERVER_HOLDERS"
"""Environment variable: processes for whose life a fork server is kept, as :func:`name_of` names them."""
LOOK_S = 0.2
"""Seconds between two looks, during the imports, whether somebody still waits."""

Start = Callable[[dict[str, Any]], int]
"""What a fork does with the arguments; gives its exit status."""


def serve(load: Callable[[], None], start: Start) -> NoReturn:
    """Listen on the socket that is standard input: ``load`` once, then ``start`` in a fork for each
    request. Ends, and says so, where ``load`` leaves threads behind.
    """
    if os.fork():
        os._exit(0)  # it is nobody's child: an owner need not reap it, and Ray does not end it
    listener = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    server = _ForkServer(listener, start)
    signal.signal(signal.SIGALRM, lambda *_: server.look_once())
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
    load()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        server.step()


def name_of(pid: int) -> str:
    """A name of a process that no later process has, e.g. ``4242-170221``."""
    return f"{pid}-{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


def is_ours(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return uid == os.getuid()


class _ForkServer:
    def __init__(self, listener: socket.socket, start: Start) -> None:
        listener.setblocking(False)
        self._listener, self._start = listener, start
        self._looks = False
        self._path = Path(listener.getsockname())
        self._made = self._path.stat().st_ino
        self._connections: dict[int, socket.socket] = {}
        self._holders: dict[int, str] = {}
        """Descriptor of a process -> its name."""
        self._children: dict[int, tuple[int, socket.socket]] = {}
        """Descriptor of a guard -> its id, and whom to tell of its end."""

    def step(self) -> None:
        """Wait until something happens, and do what that asks for."""
        poll = select.poll()
        for fd in (self._listener, *self._connections, *self._holders, *self._children):
            poll.register(fd, select.POLLIN)
        for fd, event in poll.poll():
            if fd in self._children:
                self._reap(fd)
            elif fd in self._holders:
                os.close(fd)
                del self._holders[fd]
            elif fd in self._connections and not event & select.POLLHUP:
                self._answer(self._connections[fd])
        self.end_if_unused()

    def look_once(self) -> None:
        """:meth:`end_if_unused`, but not while it is at that: it would wait for its own lock."""
        if not self._looks:
            self._looks = True
            self.end_if_unused()
            self._looks = False

    def end_if_unused(self) -> None:
        """End this process, unless somebody has a connection to it or lives whom it is kept for."""
        self._look()
        if self._connections or self._holders:
            return
        folder = os.open(self._path.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)  # nobody connects meanwhile, see fork_finding.py
        self._look()
        if self._connections:
            os.close(folder)
            return
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._made:  # else somebody removed it: it is another's
                self._path.unlink()
                self._path.with_suffix(".log").unlink(missing_ok=True)
        os._exit(0)

    def _look(self) -> None:
        """Take in those that have connected, and let those go that have closed."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                if is_ours(connection):
                    self._connections[connection.fileno()] = connection
        poll = select.poll()
        for fd in self._connections:
            poll.register(fd, 0)  # nothing but that the other end is gone
        for fd, _ in poll.poll(0):
            self._connections.pop(fd).close()

    def _answer(self, connection: socket.socket) -> None:
        """Fork for the one request that a connection brings: three descriptors, see forked.py. One that
        cannot be read, or forked for, loses its connection."""
        descriptors: list[int] = []
        try:
            descriptors += socket.recv_fds(connection, 1, 3)[1]
            text, stdin, output = descriptors
            request = json.loads(os.pread(text, os.fstat(text).st_size, 0))
            for name in request["environment"].get(HOLDERS, "").split():
                self._keep_for(name)
            _check_one_thread()
            pid = os.fork()
        except (OSError, ValueError) as error:
            sys.stderr.write(f"a request was given up: {error!r}\n")
            sys.stderr.flush()
            for descriptor in descriptors:
                os.close(descriptor)
            self._connections.pop(connection.fileno()).close()
            return
        os.close(text)
        if pid == 0:
            self._become(request, stdin, output)
        os.close(stdin)
        os.close(output)
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = pid, connection
        _tell(connection, {"pid": pid}, descriptor)

    def _keep_for(self, name: str) -> None:
        if name in self._holders.values():
            return
        with contextlib.suppress(OSError, ValueError):  # it is gone, or never was
            pid = int(name.partition("-")[0])
            descriptor = os.pidfd_open(pid)
            try:
                if name_of(pid) == name:
                    self._holders[descriptor] = name
            finally:
                if descriptor not in self._holders:
                    os.close(descriptor)

    def _reap(self, descriptor: int) -> None:
        pid, connection = self._children.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        _tell(connection, {"exit_code": os.waitstatus_to_exitcode(status)})

    def _become(self, request: dict[str, Any], stdin: int, output: int) -> NoReturn:
        """In a fork: leave nothing of the fork server but what it imported, and be a server's guard."""
        os.setsid()
        for connection in (self._listener, *self._connections.values()):
            connection.close()
        for descriptor in (*self._holders, *self._children):
            os.close(descriptor)
        for number, descriptor in enumerate((stdin, output, output)):
            os.dup2(descriptor, number)
        os.close(stdin)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        os.chdir(request["folder"])
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [request["folder"], *filter(None, places)]
        code = self._start(request["arguments"])
        sys.stdout.flush()
        os._exit(code)  # a guard has nothing to put away; what it guards ends by an exception


def _check_one_thread() -> None:
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len(threads) > 1:
        what = "what a server imports has started threads, which its fork would not have"
        sys.stderr.write(f"{what}: {', '.join(threads)}\n")
        sys.stderr.flush()
        os._exit(1)  # an exception would wait for the threads


def _tell(connection: socket.socket, message: dict[str, int], *descriptors: int) -> None:
    rights = array.array("i", descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    with contextlib.suppress(OSError):  # nobody is there who wants to know
        connection.sendmsg([json.dumps(message).encode()], ancillary, socket.MSG_DONTWAIT)
