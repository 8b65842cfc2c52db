"""A conversion cut into parts: each is written once, checked off, and skipped when begun anew.

A part's record is written after its file, so a part without one does not exist. Records go when the
manifest, which holds all of them, stands.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rollflow.storage.integrity import Record, seal, unseal
from rollflow.storage.objects import Store
from rollflow.storage.shards import MANIFEST

from .plan import Weight

PART = "rollflow.conversion.part/1"
WHOLE = "rollflow.conversion/1"
RECORDS = "parts"

Write = Callable[[BinaryIO, str, Sequence[Weight]], dict[str, Any]]
"""(stream, name of the file, weights) -> what to remember of the part."""


def cut(
    weights: Sequence[Weight], size_of: Callable[[Weight], int], most: int
) -> list[list[Weight]]:
    """Weights in their order, so many bytes together; a larger one is alone."""
    parts: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        size = size_of(weight)
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(weight)
        filled += size
    return parts


def write_part(
    target: Store, number: int, file: str, signature: str, weights: Sequence[Weight], write: Write
) -> tuple[Record, bool]:
    """(the part's record, whether it stood already). The file is complete in the store or absent.

    Raises:
        ValueError: the target holds parts of a conversion of something else.
    """
    record_url = target.join(RECORDS, f"part-{number:05d}.json")
    try:
        standing = unseal(target.get(record_url), record_url, PART)
        _same(standing, signature, target)
        return standing, True
    except FileNotFoundError:
        pass
    with tempfile.TemporaryDirectory(prefix="rollflow-convert-") as folder:
        local = Path(folder) / "part"
        with local.open("wb") as stream:
            details = write(stream, file, weights)
        target.put_file(target.join(file), local)
        size = local.stat().st_size
    record: Record = {
        "format": PART,
        "signature": signature,
        "file": file,
        "bytes": size,
        **details,
    }
    target.put_atomic(record_url, seal(record))
    return record, False


def standing_manifest(target: Store, signature: str) -> Record | None:
    """The manifest of this conversion if it is complete already.

    Raises:
        ValueError: the target holds the conversion of something else.
    """
    try:
        record = unseal(target.get(MANIFEST), target.join(MANIFEST), WHOLE)
    except FileNotFoundError:
        return None
    _same(record, signature, target)
    return record


def commit(
    target: Store, signature: str, records: Iterable[Record], facts: dict[str, Any]
) -> Record:
    """Write the manifest, last of all; the parts' own records are gone then."""
    kept = [{k: v for k, v in r.items() if k not in ("format", "signature")} for r in records]
    tensors = {name: digest for record in kept for name, digest in record.pop("tensors").items()}
    whole: Record = {
        "format": WHOLE,
        "signature": signature,
        **facts,
        "files": [{"name": r["file"], "bytes": r["bytes"]} for r in kept],
        "tensors": tensors,
    }
    target.put_atomic(MANIFEST, seal(whole))
    for url in target.list(RECORDS):
        target.delete(url)
    return whole


def _same(record: Record, signature: str, target: Store) -> None:
    if record["signature"] != signature:
        raise ValueError(
            f"{target.root} holds the conversion of another checkpoint, or with other settings; "
            "delete it or give another target"
        )
