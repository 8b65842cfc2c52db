"""Checkpoints: folders of files that exist once their manifest does."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .integrity import ManifestError, Record, seal, unseal
from .lease import check_fence
from .objects import Store
from .refs import CheckpointRef, RunRef
from .shards import MANIFEST

FORMAT = "rollflow.checkpoint/1"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a checkpoint, e.g. ``StoredFile("hf/model.safetensors", 90112, "9f86d0...")``."""

    name: str
    """Path inside the folder of the checkpoint's files."""
    bytes: int
    sha256: str


def checkpoint_url(run: RunRef, step: int) -> str:
    """Give the URL of the checkpoint taken after ``step`` was trained: where its manifest stands."""
    return f"{run.url}/checkpoints/step-{step:06d}"


def checkpoint_folder(run: RunRef, step: int) -> str:
    """Give the URL of the folder for the checkpoint's files, one of the writer's epoch alone."""
    return f"{checkpoint_url(run, step)}/epoch-{run.epoch:04d}"


def is_checkpoint_file(run: RunRef, step: int, url: str) -> bool:
    """Tell whether an object is where some epoch keeps the files of a checkpoint."""
    return re.match(r"/epoch-\d+/", url.removeprefix(checkpoint_url(run, step))) is not None


def prepare_checkpoint(store: Store, run: RunRef, step: int) -> CheckpointRef | None:
    """Make way for a checkpoint: one writer calls this before any file is stored.

    Gives the ref where the step's checkpoint is committed already, every byte of it verified: then
    nothing may be written. Otherwise deletes what an interrupted writer of this epoch left, and the
    manifest of a damaged checkpoint, and gives None. Files of other epochs stay until the commit:
    until then their writer, if it only slept, may still finish. LeaseLostError where the epoch of
    ``run`` is over.
    """
    check_fence(store, run)
    url = checkpoint_url(run, step)
    try:
        if standing := find_checkpoint(store, run, step):
            verify_checkpoint(store, standing)
            return standing
    except ManifestError:
        store.delete(store.join(url, MANIFEST))
    store.sweep(url)
    for file in store.list(checkpoint_folder(run, step)):
        store.delete(file)
    return None


def store_files(store: Store, folder: str, source: Path, names: Sequence[str]) -> list[StoredFile]:
    """Put files of the local folder ``source`` into ``checkpoint_folder`` under the same names."""
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
    """Write the manifest of files that stand in ``checkpoint_folder``.

    ``details`` is any JSON object, kept for whoever restores it. Where the step's checkpoint is
    committed already it is given back, or refused by a ManifestError if its weights differ. A file
    that is not in the store is a ManifestError too. LeaseLostError where the epoch of ``run`` is
    over. Files that the manifest does not name are deleted once it stands.
    """
    folder = checkpoint_folder(run, step)
    url = store.join(checkpoint_url(run, step), MANIFEST)
    present = set(store.list(folder))
    check_fence(store, run)
    if missing := [f.name for f in files if store.join(folder, f.name) not in present]:
        raise ManifestError(store.join(folder, missing[0]), "a file", "no such object")
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "epoch": run.epoch,
        "step": step,
        "weights_digest": weights_digest,
        "folder": folder.rpartition("/")[2],
        "files": [asdict(file) for file in sorted(files, key=lambda f: f.name)],
        "details": dict(details or {}),
        "committed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    ref = CheckpointRef(run, step, checkpoint_url(run, step), weights_digest)
    try:
        store.put_new(url, seal(record))
    except FileExistsError:
        standing = read_checkpoint(store, ref.url)["weights_digest"]
        if standing != weights_digest:
            raise ManifestError(
                url, f"weights {standing}, as committed before", f"weights {weights_digest}"
            ) from None
    for stray in find_checkpoint_strays(store, ref):
        store.delete(stray)
    return ref


def newest_checkpoint(store: Store, run: RunRef) -> CheckpointRef | None:
    """Give the newest committed checkpoint; ManifestError where its manifest is damaged."""
    for step in reversed(checkpoint_steps(store, run)):
        if ref := find_checkpoint(store, run, step):
            return ref
    return None


def newest_valid_checkpoint(
    store: Store, run: RunRef
) -> tuple[CheckpointRef | None, list[ManifestError]]:
    """Give the newest checkpoint of which every byte is as written, and what was damaged before.

    Every committed checkpoint that is newer and damaged has one error, which names the object.
    """
    damage: list[ManifestError] = []
    for step in reversed(checkpoint_steps(store, run)):
        try:
            if ref := find_checkpoint(store, run, step):
                verify_checkpoint(store, ref)
                return ref, damage
        except ManifestError as error:
            damage.append(error)
    return None, damage


def list_checkpoints(store: Store, run: RunRef) -> list[CheckpointRef]:
    """Give all committed checkpoints in order of step."""
    found = (find_checkpoint(store, run, step) for step in checkpoint_steps(store, run))
    return [ref for ref in found if ref]


def find_checkpoint(store: Store, run: RunRef, step: int) -> CheckpointRef | None:
    """Give the checkpoint of a step, or None where it is not committed."""
    url = checkpoint_url(run, step)
    try:
        record = read_checkpoint(store, url)
    except FileNotFoundError:
        return None
    return CheckpointRef(run, step, url, record["weights_digest"])


def checkpoint_steps(store: Store, run: RunRef) -> list[int]:
    """Give the steps that have a checkpoint folder, committed or not, in order."""
    names = store.children(f"{run.url}/checkpoints")
    return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-"))


def read_checkpoint(store: Store, url: str) -> Record:
    """Read the manifest of the checkpoint at ``url``; FileNotFoundError where there is none."""
    manifest = store.join(url, MANIFEST)
    record = unseal(store.get(manifest), manifest, FORMAT)
    place = f"runs/{record['run']}/checkpoints/step-{record['step']:06d}"
    if not store.join(url).endswith(f"/{place}"):
        raise ManifestError(manifest, "the manifest of that step", f"the one of {place}")
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
        url = store.join(files_folder(store, ref), file.name)
        try:
            _check(file, url, *store.checksum(url))
        except FileNotFoundError as error:
            raise ManifestError(url, f"{file.bytes} bytes", "no such object") from error
    return files


def files_folder(store: Store, ref: CheckpointRef) -> str:
    """Give the URL of the folder that holds a committed checkpoint's files."""
    return store.join(ref.url, read_checkpoint(store, ref.url).get("folder", ""))


def find_checkpoint_strays(store: Store, ref: CheckpointRef) -> list[str]:
    """Give the URLs of objects of a committed checkpoint that its manifest does not name."""
    folder = files_folder(store, ref)
    files = read_checkpoint(store, ref.url)["files"]
    named = {store.join(folder, file["name"]) for file in files}
    named.add(store.join(ref.url, MANIFEST))
    return [url for url in store.list(ref.url) if url not in named]


def fetch_checkpoint(store: Store, ref: CheckpointRef, staging: Path) -> Path:
    """Give a local folder with the verified files: the store's own, or ``staging`` filled."""
    files = verify_checkpoint(store, ref)
    folder = files_folder(store, ref)
    if local := store.local_path(folder):
        return local
    for file in files:
        url, target = store.join(folder, file.name), staging / file.name
        store.get_file(url, target)
        _check(file, url, *_local_checksum(target))
    return staging


def delete_checkpoint(store: Store, ref: CheckpointRef) -> None:
    """Delete a checkpoint, its manifest first, so that half of one never exists.

    LeaseLostError where the epoch of ``ref.run`` is over.
    """
    check_fence(store, ref.run)
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
