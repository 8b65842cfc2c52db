"""Old steps once more as Parquet, for fast scans. The log itself is not touched and never needs it.

``compact/step-000000-000063.parquet`` holds the members of those batches, ordered by step, group and
index, one row group a step; the record beside it, written last, names the batches and the checksum.
"""

import io
import re
from dataclasses import dataclass

import pyarrow as pa

from .integrity import ManifestError, Record, seal, sha256_hex, unseal
from .manifests import batch_steps, find_batch, read_table
from .objects import Store
from .refs import BatchRef, RunRef

FORMAT = "rollflow.compaction/1"
STEPS_PER_FILE = 64
BYTES_PER_FILE = 256 << 20
"""A file of fewer steps is closed once it is so large."""

_RECORD = re.compile(r"step-(\d{6,})-(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class Compacted:
    """One Parquet file and what it stands for."""

    url: str
    first: int
    last: int
    digests: dict[int, str]
    """Digest of each batch that it holds, by step."""
    rows: int
    sha256: str


def compact(store: Store, run: RunRef, before: int | None = None) -> list[Compacted]:
    """Write the committed batches of steps below ``before`` (all unless given); give new files.

    Steps that a file holds already are left alone. Safe beside a run that goes on: a committed batch
    never changes, and no writer of the run reads what this writes.
    """
    done = {step for file in compactions(store, run) for step in file.digests}
    made: list[Compacted] = []
    pending: list[BatchRef] = []
    for step in batch_steps(store, run):
        ref = find_batch(store, run, step)
        if step in done or ref is None or (before is not None and step >= before):
            made += _write(store, run, pending)
            pending = []
            continue
        pending.append(ref)
        if len(pending) == STEPS_PER_FILE:
            made += _write(store, run, pending)
            pending = []
    return made + _write(store, run, pending)


def compactions(store: Store, run: RunRef) -> list[Compacted]:
    """Give the Parquet files of a run in order of their steps."""
    names = [n for n in store.children(f"{run.url}/compact") if _RECORD.fullmatch(n)]
    urls = [f"{run.url}/compact/{name}" for name in names]
    return [_read(url, data) for url, data in zip(urls, store.get_all(urls), strict=True)]


def _write(store: Store, run: RunRef, batches: list[BatchRef]) -> list[Compacted]:
    made: list[Compacted] = []
    while batches:
        data, taken = _encode(store, batches)
        made.append(_commit(store, run, batches[:taken], data))
        batches = batches[taken:]
    return made


def _encode(store: Store, batches: list[BatchRef]) -> tuple[bytes, int]:
    """Give one file and how many batches went into it."""
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    writer: pq.ParquetWriter | None = None
    taken = 0
    for ref in batches:
        table = read_table(store, ref)
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=max(table.num_rows, 1))
        taken += 1
        if sink.tell() >= BYTES_PER_FILE:
            break
    assert writer is not None
    writer.close()
    return sink.getvalue(), taken


def _commit(store: Store, run: RunRef, batches: list[BatchRef], data: bytes) -> Compacted:
    first, last = batches[0].step, batches[-1].step
    stem = f"{run.url}/compact/step-{first:06d}-{last:06d}"
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "first": first,
        "last": last,
        "batches": [[ref.step, ref.digest] for ref in batches],
        "rows": sum(ref.rows for ref in batches),
        "sha256_of_file": sha256_hex(data),
        "bytes": len(data),
        "arrow": pa.__version__,
    }
    store.put_atomic(f"{stem}.parquet", data)
    url = store.put_atomic(f"{stem}.json", seal(record))
    return _read(url, seal(record))


def _read(url: str, data: bytes) -> Compacted:
    record = unseal(data, url, FORMAT)
    place = f"runs/{record['run']}/compact/step-{record['first']:06d}-{record['last']:06d}.json"
    if not url.endswith(f"/{place}"):
        raise ManifestError(url, "the record of that file", f"the one of {place}")
    return Compacted(
        url=f"{url.removesuffix('.json')}.parquet",
        first=record["first"],
        last=record["last"],
        digests=dict(record["batches"]),
        rows=record["rows"],
        sha256=record["sha256_of_file"],
    )
