"""Parts of a batch: Arrow IPC files, written while generation still runs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from .integrity import ManifestError, sha256_hex
from .lease import check_fence
from .objects import Store
from .refs import RunRef
from .samples import Sample
from .schema import SCHEMA, to_table, upgraded

MANIFEST = "manifest.json"
"""Name of the object that makes a folder exist."""
PART_NAME = re.compile(r"part-(\d{4,}|x[0-9a-f]{8})-(\d{5,})\.arrow")
"""Names of parts: the writer's fencing epoch, or ``x`` and its name where it has none; its number."""

_SEAL = b"rollflow.sha256"
_BLANK = b"0" * 64


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a batch, e.g. ``Part("part-0007-00000.arrow", 128, 90112, "9f86d0...")``."""

    name: str
    rows: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes a batch's parts one after another into a folder that has no manifest yet.

    Parts are named by the writer's epoch and never replaced, and what other writers left there is
    let alone: ``durable_groups`` finds what is good in it, and ``commit_batch`` clears it away.
    ManifestError where the folder is committed already, LeaseLostError where the epoch is over.
    """

    def __init__(self, store: Store, run: RunRef, folder: str) -> None:
        self._store = store
        self._run = run
        self.folder = store.join(folder)
        self._parts: list[Part] = []
        self._is_evaluation = self.folder.startswith(store.join(run.url, "evals") + "/")
        self._writer = f"x{run.writer}" if run.writer else f"{run.epoch:04d}"
        check_fence(store, run, evaluation=self._is_evaluation)
        if store.exists(manifest := store.join(self.folder, MANIFEST)):
            raise ManifestError(manifest, "no such object", "a committed batch")
        store.sweep(self.folder)
        names = filter(None, map(PART_NAME.fullmatch, part_names(store, folder)))
        numbers = [int(name[2]) for name in names if name[1] == self._writer]
        self._number = max(numbers, default=-1) + 1

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts so far, in order."""
        return tuple(self._parts)

    def append(self, samples: Sequence[Sample]) -> Part:
        """Write the samples as the next part; it is durable when this returns.

        LeaseLostError where this writer's epoch is over.
        """
        data = encode(to_table(samples))
        name = f"part-{self._writer}-{self._number:05d}.arrow"
        url = self._store.join(self.folder, name)
        check_fence(self._store, self._run, evaluation=self._is_evaluation)
        try:
            self._store.put_new(url, data)
        except FileExistsError as error:
            if self._store.get(url) != data:  # else only the answer to our put got lost
                found = f"one of another writer {self._writer}"
                raise ManifestError(url, "no part of that name", found) from error
        part = Part(name, len(samples), len(data), sha256_hex(data))
        self._parts.append(part)
        self._number += 1
        return part


def read_part(store: Store, folder: str, part: Part) -> pa.Table:
    """Read a part and verify bytes, checksum, schema and rows; ManifestError names what differs."""
    url = store.join(folder, part.name)
    try:
        data = store.get_buffer(url)
    except FileNotFoundError as error:
        raise ManifestError(url, f"{part.bytes} bytes", "no such object") from error
    if data.size != part.bytes:
        raise ManifestError(url, f"{part.bytes} bytes", f"{data.size} bytes")
    if (found := sha256_hex(memoryview(data))) != part.sha256:
        raise ManifestError(url, f"sha256 {part.sha256}", f"sha256 {found}")
    table = decode(data, url)
    if table.num_rows != part.rows:
        raise ManifestError(url, f"{part.rows} rows", f"{table.num_rows} rows")
    return table


def part_names(store: Store, folder: str) -> list[str]:
    """Give the names of the parts that stand in a folder, committed or not, the oldest first."""
    return sorted(filter(PART_NAME.fullmatch, store.children(folder)), key=_place)


def read_loose_part(store: Store, folder: str, name: str) -> tuple[Part, pa.Table]:
    """Read a part that no manifest speaks of, verified by its own seal; ManifestError names it."""
    url = store.join(folder, name)
    data = store.get(url)
    table = decode(data, url)
    if not _is_sealed(data):
        raise ManifestError(url, "a part as it was sealed", "other bytes")
    return Part(name, table.num_rows, len(data), sha256_hex(data)), table


def encode(table: pa.Table) -> bytes:
    """Give the table as an Arrow IPC file, zstd-compressed; equal tables give equal bytes.

    Its metadata hold a seal under ``rollflow.sha256``: the checksum of the file with zeros in place
    of the seal, so that a part can be verified before a manifest names it.
    """
    schema = SCHEMA.with_metadata({**SCHEMA.metadata, _SEAL: _BLANK})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table.combine_chunks().replace_schema_metadata(schema.metadata))
    data = sink.getvalue().to_pybytes()
    return _reseal(data, _BLANK, sha256_hex(data).encode())


def decode(data: bytes | pa.Buffer, name: str) -> pa.Table:
    """Read an Arrow IPC file of any schema version; ManifestError names the object otherwise."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        table.validate(full=True)
        return upgraded(table)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ManifestError(name, "an Arrow file of samples", str(error)) from error


def _is_sealed(data: bytes) -> bool:
    metadata = pa.ipc.open_file(pa.BufferReader(data)).schema.metadata
    seal = metadata.get(_SEAL, b"")
    return len(seal) == 64 and sha256_hex(_reseal(data, seal, _BLANK)).encode() == seal


def _reseal(data: bytes, old: bytes, new: bytes) -> bytes:
    """Replace the seal where the schema stands: at the start of the file and in its footer."""
    first, last = data.find(old), data.rfind(old)
    if not 0 <= first < last:
        return b""
    size = len(old)
    return b"".join((data[:first], new, data[first + size : last], new, data[last + size :]))


def _place(name: str) -> tuple[int, int]:
    found = PART_NAME.fullmatch(name)
    assert found
    epoch = -1 if found[1].startswith("x") else int(found[1])
    return epoch, int(found[2])
