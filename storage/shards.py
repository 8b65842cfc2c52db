"""Parts of a batch: Arrow IPC files, written while generation still runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from .integrity import ManifestError, sha256_hex
from .objects import Store
from .samples import Sample
from .schema import SCHEMA, check_schema, to_table

MANIFEST = "manifest.json"
"""Name of the object that makes a folder exist."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a batch, e.g. ``Part("part-00000.arrow", 128, 90112, "9f86d0...")``."""

    name: str
    rows: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes a batch's parts one after another into a folder that has no manifest yet.

    What an earlier writer left there is deleted, except the parts given as ``keep``, after which
    the new ones are numbered. ManifestError where the folder is committed already.
    """

    def __init__(self, store: Store, folder: str, keep: Sequence[Part] = ()) -> None:
        self._store = store
        self.folder = store.join(folder)
        self._parts = list(keep)
        if store.exists(store.join(self.folder, MANIFEST)):
            raise ManifestError(self.folder, "no manifest", "a committed batch")
        kept = {store.join(self.folder, part.name) for part in keep}
        store.sweep(self.folder)
        for url in store.list(self.folder):
            if url not in kept:
                store.delete(url)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts so far, in order."""
        return tuple(self._parts)

    def append(self, samples: Sequence[Sample]) -> Part:
        """Write the samples as the next part; it is durable when this returns."""
        data = encode(to_table(samples))
        name = f"part-{len(self._parts):05d}.arrow"
        self._store.put_atomic(self._store.join(self.folder, name), data)
        part = Part(name, len(samples), len(data), sha256_hex(data))
        self._parts.append(part)
        return part


def read_part(store: Store, folder: str, part: Part) -> pa.Table:
    """Read a part and verify bytes, checksum, schema and rows; ManifestError names what differs."""
    url = store.join(folder, part.name)
    try:
        data = store.get(url)
    except FileNotFoundError as error:
        raise ManifestError(url, f"{part.bytes} bytes", "no such object") from error
    if len(data) != part.bytes:
        raise ManifestError(url, f"{part.bytes} bytes", f"{len(data)} bytes")
    if (found := sha256_hex(data)) != part.sha256:
        raise ManifestError(url, f"sha256 {part.sha256}", f"sha256 {found}")
    table = decode(data, url)
    if table.num_rows != part.rows:
        raise ManifestError(url, f"{part.rows} rows", f"{table.num_rows} rows")
    return table


def find_parts(store: Store, folder: str) -> list[Part]:
    """Describe the parts that stand in a folder, committed or not, by reading them.

    Parts are written whole, so what an interrupted writer left is good to ``keep``.
    """
    parts: list[Part] = []
    for name in store.children(folder):
        if name.startswith("part-") and name.endswith(".arrow"):
            url = store.join(folder, name)
            data = store.get(url)
            parts.append(Part(name, decode(data, url).num_rows, len(data), sha256_hex(data)))
    return parts


def encode(table: pa.Table) -> bytes:
    """Give the table as an Arrow IPC file, zstd-compressed; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def decode(data: bytes, name: str) -> pa.Table:
    """Read an Arrow IPC file of schema v1; ManifestError names the object otherwise."""
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        table.validate(full=True)
        check_schema(table.schema)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ManifestError(name, "an Arrow file of schema 1", str(error)) from error
    return table
