"""Commit point A: a batch exists once its manifest does. Rollouts and evaluations alike."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from .integrity import ManifestError, Record, pack_metrics, seal, sha256_hex, unpack_metrics, unseal
from .lease import check_fence
from .objects import Store
from .refs import BatchRef, RunRef
from .samples import Sample
from .schema import SCHEMA, from_table
from .shards import MANIFEST, PART_NAME, Part, read_part

FORMAT = "rollflow.batch/1"
ISSUED = re.compile(r"issued(-\d{4})?\.json")
"""Names of the objects that say which groups a step was given; ``ledger.py`` writes them."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why a group that stands in a batch's parts is no member of the batch."""

    reason: str
    """``cut``, ``surplus``, or what a filter said."""
    rows: int


def batch_folder(run: RunRef, step: int, dataset: str | None = None) -> str:
    """Give the URL of a step's rollouts, or of its evaluation on ``dataset``."""
    kind = "rollouts" if dataset is None else f"evals/{dataset}"
    return f"{run.url}/{kind}/step-{step:06d}"


def commit_batch(
    store: Store,
    run: RunRef,
    folder: str,
    step: int,
    parts: Sequence[Part],
    *,
    groups: int,
    policy_versions: Sequence[int],
    metrics: Mapping[str, float],
    ledger: Mapping[str, Any],
    dataset: str | None = None,
    left_out: Mapping[str, LeftOut] | None = None,
) -> BatchRef:
    """Write the manifest of parts that stand in ``folder``: commit point A.

    ``folder`` is ``batch_folder(run, step, dataset)``. ``policy_versions`` are all that occur in
    the batch; ``ledger`` is any JSON object. ``left_out`` names groups that stand in the parts and
    are no members: nobody trains on them, :func:`read_left_out` gives them. Committing the same parts again gives the ref that
    stands; other parts under a committed manifest, a part that is missing and an object that does
    not belong there are ManifestErrors. Of two evaluations of the same weights the first that is
    committed stands and is given to both. LeaseLostError where the epoch of ``run`` is over. Parts
    that the manifest does not name are deleted once it stands.
    """
    folder = store.join(folder)
    if folder != (right := batch_folder(run, step, dataset)):
        raise ValueError(f"folder is {folder!r}; a batch of this run and step goes to {right!r}")
    out = dict(left_out or {})
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "epoch": run.epoch,
        "step": step,
        "dataset": dataset,
        "digest": batch_digest(parts, out),
        "rows": sum(part.rows for part in parts) - sum(o.rows for o in out.values()),
        "groups": groups,
        "left_out": {group_id: asdict(o) for group_id, o in sorted(out.items())},
        "policy_versions": sorted(set(policy_versions)),
        "parts": [asdict(part) for part in parts],
        "metrics": pack_metrics(metrics),
        "ledger": dict(ledger),
        "committed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    url = store.join(folder, MANIFEST)
    problem = None if store.exists(url) else _folder_problem(store, run, folder, parts)
    # Before the problem is raised: who is late shall hear that, whatever else is wrong by now.
    check_fence(store, run, evaluation=dataset is not None)
    # An evaluation that another one committed first has lost its parts to that one's clearing up.
    if problem and not (dataset is not None and store.exists(url)):
        raise problem
    try:
        store.put_new(url, seal(record))
    except FileExistsError:
        standing = read_manifest(store, folder)
        if standing["digest"] != record["digest"] and dataset is None:
            raise ManifestError(
                url, f"digest {record['digest']}", f"digest {standing['digest']}, committed before"
            ) from None
        record = standing
    ref = _ref(run, folder, record)
    clear_strays(store, ref)
    return ref


def find_batch(store: Store, run: RunRef, step: int, dataset: str | None = None) -> BatchRef | None:
    """Give the committed batch of a step, or None where there is no manifest."""
    folder = batch_folder(run, step, dataset)
    try:
        return _ref(run, folder, read_manifest(store, folder))
    except FileNotFoundError:
        return None


def batch_steps(store: Store, run: RunRef, dataset: str | None = None) -> list[int]:
    """Give the steps that have a batch folder, committed or not, in order."""
    names = store.children(batch_folder(run, 0, dataset).rpartition("/")[0])
    return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-"))


def dataset_names(store: Store, run: RunRef) -> list[str]:
    """Give the names of the datasets that the run was evaluated on."""
    return store.children(f"{run.url}/evals")


def read_batch(store: Store, ref: BatchRef) -> list[Sample]:
    """Read a batch, verified, ordered by group and index whatever order it was finished in."""
    return from_table(read_table(store, ref))


def read_table(store: Store, ref: BatchRef) -> pa.Table:
    """Read a batch as one table of ``SCHEMA``, verified, ordered by group and index.

    ManifestError where the manifest is damaged or is not the ref's, where a part is missing, torn
    or changed, and where a sample occurs twice.
    """
    members, _ = _read_tables(store, ref)
    return members


def read_left_out(store: Store, ref: BatchRef) -> list[Sample]:
    """Read the samples in a batch's parts that are no members of it, verified and ordered alike."""
    _, others = _read_tables(store, ref)
    return from_table(others)


def _read_tables(store: Store, ref: BatchRef) -> tuple[pa.Table, pa.Table]:
    """The batch's members, and what stands beside them in its parts."""
    manifest = read_manifest(store, ref.url)
    url = store.join(ref.url, MANIFEST)
    if manifest["digest"] != ref.digest:
        raise ManifestError(url, f"digest {ref.digest}", f"digest {manifest['digest']}")
    parts = manifest_parts(manifest)
    table = pa.concat_tables(
        [SCHEMA.empty_table(), *(read_part(store, ref.url, part) for part in parts)]
    )
    _check_samples(table, manifest, url)
    table = table.sort_by([("group_id", "ascending"), ("index", "ascending")])
    left_out = manifest_left_out(manifest)
    if not left_out:
        return table, SCHEMA.empty_table()
    out = [group_id in left_out for group_id in table.column("group_id").to_pylist()]
    return table.filter([not o for o in out]), table.filter(out)


def read_manifest(store: Store, folder: str) -> Record:
    """Read a batch folder's manifest; FileNotFoundError where it is not committed."""
    url = store.join(folder, MANIFEST)
    manifest = unseal(store.get(url), url, FORMAT)
    found = batch_digest(manifest_parts(manifest), manifest_left_out(manifest))
    if found != manifest["digest"]:
        raise ManifestError(url, f"digest {manifest['digest']}", f"digest {found} of its parts")
    kind = "rollouts" if manifest["dataset"] is None else f"evals/{manifest['dataset']}"
    place = f"runs/{manifest['run']}/{kind}/step-{manifest['step']:06d}"
    if not store.join(folder).endswith(f"/{place}"):
        raise ManifestError(url, "the manifest of that batch", f"the one of {place}")
    return manifest


def manifest_parts(manifest: Record) -> list[Part]:
    """Give the parts that a manifest names."""
    return [Part(**part) for part in manifest["parts"]]


def manifest_left_out(manifest: Record) -> dict[str, LeftOut]:
    """Give the groups that stand in the parts without being members, and why."""
    return {group_id: LeftOut(**o) for group_id, o in manifest.get("left_out", {}).items()}


def find_strays(store: Store, ref: BatchRef) -> list[str]:
    """Give the URLs of objects in a committed folder that its manifest does not name.

    They are never read; an interrupted, late or second writer has left them.
    """
    named = {part.name for part in manifest_parts(read_manifest(store, ref.url))}
    known = {store.join(ref.url, name) for name in named | {MANIFEST}}
    found = [url for url in store.list(ref.url) if url not in known]
    return [url for url in found if not ISSUED.fullmatch(url.rpartition("/")[2])]


def clear_strays(store: Store, ref: BatchRef) -> list[str]:
    """Delete the parts in a committed folder that its manifest does not name; give their URLs.

    A manifest never changes, so this is safe whoever does it and whenever.
    """
    strays = [u for u in find_strays(store, ref) if PART_NAME.fullmatch(u.rpartition("/")[2])]
    for url in strays:
        store.delete(url)
    return strays


def batch_digest(parts: Sequence[Part], left_out: Mapping[str, LeftOut]) -> str:
    """Give the batch's name: the sha256 over its parts' names, rows, sizes and checksums, and over
    the groups in them that are no members."""
    lines = [f"{p.name} {p.rows} {p.bytes} {p.sha256}" for p in parts]
    lines += [f"without {group_id} {o.rows}" for group_id, o in sorted(left_out.items())]
    return sha256_hex("\n".join(lines).encode())


def _folder_problem(
    store: Store, run: RunRef, folder: str, parts: Sequence[Part]
) -> ManifestError | None:
    expected = [part.name for part in parts]
    if len(set(expected)) != len(expected):
        return ManifestError(folder, "each part once", f"{expected}")
    found = store.children(folder)
    if missing := sorted(set(expected) - set(found)):
        return ManifestError(f"{folder}/{missing[0]}", "a part", "no such object")
    for name in sorted(set(found) - {*expected, MANIFEST}):
        if ISSUED.fullmatch(name):
            continue
        part = PART_NAME.fullmatch(name)
        if part is None or not _may_stand_beside(part[1], run, folder):
            allowed = f"parts up to epoch {run.epoch}"
            return ManifestError(f"{folder}/{name}", allowed, "an object of somebody else")
    return None


def _may_stand_beside(writer: str, run: RunRef, folder: str) -> bool:
    """Whether a part of ``writer`` may stand in a folder that ``run``'s writer commits."""
    if folder.startswith(f"{run.url}/evals/") and (writer.startswith("x") or run.writer):
        return True
    return not writer.startswith("x") and int(writer) <= run.epoch


def _check_samples(table: pa.Table, manifest: Record, url: str) -> None:
    """Check what only the whole can show: every sample once, as many groups as promised."""
    left_out = manifest_left_out(manifest)
    group_ids = table.column("group_id").to_pylist()
    counts = Counter(zip(group_ids, table.column("index").to_pylist(), strict=True))
    rows = Counter(group_ids)
    for group_id, out in left_out.items():
        if rows[group_id] != out.rows:
            raise ManifestError(
                url, f"{out.rows} rows of {group_id}, left out", f"{rows[group_id]} rows"
            )
    for (group_id, index), count in counts.items():
        if count > 1:
            raise ManifestError(url, f"sample {group_id}#{index} once", f"{count} times")
    if (found := len(set(group_ids) - set(left_out))) != manifest["groups"]:
        raise ManifestError(url, f"{manifest['groups']} groups", f"{found} groups")


def _ref(run: RunRef, folder: str, manifest: Record) -> BatchRef:
    return BatchRef(
        run=run,
        step=manifest["step"],
        url=folder,
        rows=manifest["rows"],
        groups=manifest["groups"],
        digest=manifest["digest"],
        metrics=unpack_metrics(manifest["metrics"]),
    )
