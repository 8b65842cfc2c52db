"""Finds the fork server of this machine, or makes it.

It is found by a socket in a folder that only this user can enter, under a name made of all by which
the imports could differ. Whoever connects holds the folder's lock, and so does a fork server when it
ends: two that start at once make one, and nobody is left with one that is just ending.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rollflow.engines

from .fork_server import HOLDERS, is_ours

LOCK_S, LOCK_POLL_S = 30.0, 0.01
MAKE_S = 20.0
"""Seconds for the start of Python in which the lock is held; less than others wait for it."""
KEPT_S = 3600.0
IMPORTANT = (
    *("SGLANG_", "TORCH", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("PYTHON", "GLOO_", "TOKENIZERS_", "TRITON_", "FLASHINFER_", "VLLM_", "PROMETHEUS_"),
    *("HOME", "XDG_CACHE_HOME", "LD_", "LC_", "LANG", "SYNC_TOKEN_", "WAVE_"),
)  # fmt: skip
"""Beginnings of the names of environment variables that may be read when modules are imported."""
UNIMPORTANT = ("PYTHONBREAKPOINT", "TORCHINDUCTOR_CACHE_DIR")
"""Set by Ray and by PyTorch in some of our processes; nothing that is imported here depends on them."""


def connect(environment: Mapping[str, str], command: Sequence[str]) -> tuple[socket.socket, Path]:
    """A connection to the fork server whose imports are those of ``environment``, and its log.

    Its imports may not be done yet; it reads what it was sent once they are. Where they fail the
    connection ends.

    Raises:
        TimeoutError: another process does not let go of the lock, or Python takes too long to start.
    """
    folder = _private_folder()
    environment = _at_import(environment)
    path = folder / f"{_key(environment, command)}.socket"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _locked(folder):
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                _make(connection, path, environment, command)
        if not is_ours(connection):
            raise PermissionError(f"{path} was made by another user")
    except BaseException:
        connection.close()
        raise
    return connection, path.with_suffix(".log")


def _make(
    connection: socket.socket, path: Path, environment: Mapping[str, str], command: Sequence[str]
) -> None:
    """Start a fork server and connect to it; where it fails the connection ends."""
    path.unlink(missing_ok=True)
    _sweep(path.parent)
    log = path.with_suffix(".log").open("wb")
    with log, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(128)
        connection.connect(str(path))
        try:
            subprocess.run(
                command,
                stdin=listener.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env=dict(environment),
                timeout=MAKE_S,
            )
        except subprocess.TimeoutExpired as error:
            what = f"a fork server did not start within {MAKE_S:.0f} s; {log.name}"
            raise TimeoutError(what) from error


def _sweep(folder: Path) -> None:
    """Remove what fork servers left that failed or were killed, once nobody reads it any more."""
    for log in folder.glob("*.log"):
        if time.time() - log.stat().st_mtime > KEPT_S:
            path = log.with_suffix(".socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                if connection.connect_ex(str(path)):  # nobody listens
                    path.unlink(missing_ok=True)
                    log.unlink()


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the imports: of the folders where modules are looked for those with packages,
    not those with a user's functions, which servers do not import."""
    here, home = str(Path.cwd()), str(Path(*rollflow.engines.__path__).parent.parent)
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    places = [*([here] if here == home else []), *map(os.path.abspath, given)]
    found = dict.fromkeys(filter(_has_packages, places))
    return {**environment, "PYTHONPATH": os.pathsep.join(found), HOLDERS: ""}


def _has_packages(place: str) -> bool:
    names = ("rollflow", "sglang", "torch", "sitecustomize.py", "usercustomize.py")
    return any((Path(place) / name).exists() for name in names) or any(
        Path(place).glob("*.dist-info")
    )


def _key(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """A name for all by which the imports of two owners could differ, and what forks inherit."""
    code = Path(*rollflow.engines.__path__)
    sglang = importlib.util.find_spec("sglang")
    packages = Path(sglang.origin).parent.parent if sglang and sglang.origin else code
    seen = [
        [*command, sys.version],
        sorted(
            (name, value)
            for name, value in environment.items()
            if name.startswith(IMPORTANT) and name not in UNIMPORTANT
        ),
        [str(packages), packages.stat().st_mtime_ns, importlib.metadata.version("sglang")],
        sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in _sources(code)),
        sorted(os.sched_getaffinity(0)),
        [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "net", "pid")],
        Path("/proc/self/cgroup").read_text(),
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _sources(engines: Path) -> Iterator[Path]:
    """Of our code what a server may import."""
    for folder in (engines, engines.parent / "storage"):
        yield from folder.rglob("*.py")


def _private_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rf-{os.getuid()}-forks"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder that only this user can enter; remove it")
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. TimeoutError where somebody else does not let go of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    what = f"another process has held the lock of {folder} for {LOCK_S:.0f} s"
                    raise TimeoutError(what) from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
