"""Checkpoints: folders of files that exist once their manifest does."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .integrity import ManifestError, Record, seal, unseal
from .objects import Store
from .refs import CheckpointRef, RunRef
from .shards import MANIFEST

FORMAT = "rollflow.checkpoint/1"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a checkpoint, e.g. ``StoredFile("hf/model.safetensors", 90112, "9f86d0...")``."""

    name: str
    """Path inside the checkpoint's folder."""
    bytes: int
    sha256: str


def checkpoint_folder(run: RunRef, step: int) -> str:
    """Give the URL of the checkpoint taken after ``step`` was trained."""
    return f"{run.url}/checkpoints/step-{step:06d}"


def prepare_checkpoint(store: Store, run: RunRef, step: int) -> CheckpointRef | None:
    """Make way for a checkpoint: one writer calls this before any file is stored.

    Gives the ref where the step's checkpoint is committed already: then nothing may be written.
    Otherwise deletes what an interrupted writer left there and gives None.
    """
    if standing := find_checkpoint(store, run, step):
        return standing
    folder = checkpoint_folder(run, step)
    store.sweep(folder)
    for url in store.list(folder):
        store.delete(url)
    return None


def store_files(store: Store, folder: str, source: Path, names: Sequence[str]) -> list[StoredFile]:
    """Put files of the local folder ``source`` into a checkpoint's folder under the same names."""
    stored: list[StoredFile] = []
    for name in names:
        stored.append(StoredFile(name, *_local_checksum(source / name)))
        store.put_file(store.join(folder, name), source / name)
    return stored


def commit_checkpoint(
    store: Store,
    run: RunRef,
    step: int,
    weights_digest: str,
    files: Sequence[StoredFile],
    details: Mapping[str, Any] | None = None,
) -> CheckpointRef:
    """Write the manifest of files that stand in the checkpoint's folder.

    ``details`` is any JSON object, kept for whoever restores it. Where the step's checkpoint is
    committed already it is given back, or refused by a ManifestError if its weights differ. A file
    that is not in the store is a ManifestError too.
    """
    folder = checkpoint_folder(run, step)
    url = store.join(folder, MANIFEST)
    present = set(store.list(folder))
    if missing := [f.name for f in files if store.join(folder, f.name) not in present]:
        raise ManifestError(store.join(folder, missing[0]), "a file", "no such object")
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "step": step,
        "weights_digest": weights_digest,
        "files": [asdict(file) for file in sorted(files, key=lambda f: f.name)],
        "details": dict(details or {}),
        "committed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    try:
        store.put_new(url, seal(record))
    except FileExistsError:
        standing = read_checkpoint(store, folder)["weights_digest"]
        if standing != weights_digest:
            raise ManifestError(
                url, f"weights {standing}, as committed before", f"weights {weights_digest}"
            ) from None
    return CheckpointRef(run, step, folder, weights_digest)


def newest_checkpoint(store: Store, run: RunRef) -> CheckpointRef | None:
    """Give the newest committed checkpoint; ManifestError where its manifest is damaged."""
    for step in reversed(checkpoint_steps(store, run)):
        if ref := find_checkpoint(store, run, step):
            return ref
    return None


def list_checkpoints(store: Store, run: RunRef) -> list[CheckpointRef]:
    """Give all committed checkpoints in order of step."""
    found = (find_checkpoint(store, run, step) for step in checkpoint_steps(store, run))
    return [ref for ref in found if ref]


def find_checkpoint(store: Store, run: RunRef, step: int) -> CheckpointRef | None:
    """Give the checkpoint of a step, or None where it is not committed."""
    folder = checkpoint_folder(run, step)
    try:
        record = read_checkpoint(store, folder)
    except FileNotFoundError:
        return None
    return CheckpointRef(run, step, folder, record["weights_digest"])


def checkpoint_steps(store: Store, run: RunRef) -> list[int]:
    """Give the steps that have a checkpoint folder, committed or not, in order."""
    names = store.children(f"{run.url}/checkpoints")
    return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-"))


def read_checkpoint(store: Store, folder: str) -> Record:
    """Read a checkpoint's manifest, verified; FileNotFoundError where it is not committed."""
    url = store.join(folder, MANIFEST)
    record = unseal(store.get(url), url, FORMAT)
    if f"step-{record['step']:06d}" != store.join(folder).rpartition("/")[2]:
        raise ManifestError(url, "the manifest of that step", f"step {record['step']}")
    return record


def verify_checkpoint(store: Store, ref: CheckpointRef) -> list[StoredFile]:
    """Read every byte of a checkpoint; ManifestError names the first file that is not as written."""
    record = read_checkpoint(store, ref.url)
    if record["weights_digest"] != ref.weights_digest:
        raise ManifestError(
            ref.url, f"weights {ref.weights_digest}", f"weights {record['weights_digest']}"
        )
    files = [StoredFile(**file) for file in record["files"]]
    for file in files:
        url = store.join(ref.url, file.name)
        try:
            _check(file, url, *store.checksum(url))
        except FileNotFoundError as error:
            raise ManifestError(url, f"{file.bytes} bytes", "no such object") from error
    return files


def fetch_checkpoint(store: Store, ref: CheckpointRef, staging: Path) -> Path:
    """Give a local folder with the verified files: the store's own, or ``staging`` filled."""
    files = verify_checkpoint(store, ref)
    if local := store.local_path(ref.url):
        return local
    for file in files:
        url, target = store.join(ref.url, file.name), staging / file.name
        store.get_file(url, target)
        _check(file, url, *_local_checksum(target))
    return staging


def delete_checkpoint(store: Store, ref: CheckpointRef) -> None:
    """Delete a checkpoint, its manifest first, so that half of one never exists."""
    store.delete(store.join(ref.url, MANIFEST))
    for url in store.list(ref.url):
        store.delete(url)


def _local_checksum(file: Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return file.stat().st_size, digest


def _check(file: StoredFile, url: str, size: int, digest: str) -> None:
    if (size, digest) != (file.bytes, file.sha256):
        raise ManifestError(
            url, f"{file.bytes} bytes, sha256 {file.sha256}", f"{size} bytes, sha256 {digest}"
        )
