"""Temporary folders for sockets, short of name, which are swept up after owners that were killed."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path


def scratch_folder() -> Path:
    """Make a folder that lasts as long as this process or one that it forks; sweep up old ones.

    The name is short: a socket's path may have 107 bytes. A file lock says that it is in use.
    """
    parent = Path(tempfile.gettempdir()) / f"rf-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    guard = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # nobody sweeps between making and locking
        for folder in parent.iterdir():
            _remove_if_abandoned(folder)
        folder = Path(tempfile.mkdtemp(prefix="", dir=parent))
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
    finally:
        os.close(guard)
    return folder


def _remove_if_abandoned(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its owner put it away just now
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)
