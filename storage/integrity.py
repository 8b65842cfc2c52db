"""Records that carry their own checksum, and the error that names what was damaged."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]


class ManifestError(ValueError):
    """A stored object is not what its record says; names the object, the expected and the found."""

    def __init__(self, name: str, expected: object, found: object) -> None:
        super().__init__(name, expected, found)
        self.name = name
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found}"


def seal(record: Mapping[str, Any]) -> bytes:
    """Give the record as indented JSON with its checksum under ``sha256``.

    ValueError names the entry that JSON cannot hold exactly.
    """
    plain = {key: exact_json(value, key) for key, value in record.items()}
    return json.dumps({**plain, "sha256": json_digest(plain)}, indent=1).encode() + b"\n"


def unseal(data: bytes, name: str, format_name: str) -> Record:
    """Read a sealed record of that ``format``; ManifestError where a byte of it has changed."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ManifestError(name, "a JSON record", f"{len(data)} bytes ({error})") from error
    if not isinstance(record, dict) or "sha256" not in record:
        raise ManifestError(name, "a record with its checksum", "none")
    expected = record.pop("sha256")
    if (found := json_digest(record)) != expected:
        raise ManifestError(name, f"sha256 {expected}", f"sha256 {found}")
    if record.get("format") != format_name:
        raise ManifestError(name, f"format {format_name}", f"format {record.get('format')}")
    return record


def json_digest(value: object) -> str:
    """Give the sha256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256_hex(text.encode())


def sha256_hex(data: bytes | memoryview) -> str:
    """Give the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def exact_json(value: Any, name: str) -> Any:
    """Give ``value`` back if JSON holds it exactly (no tuple, no NaN, only string keys).

    ValueError names the entry and its value otherwise.
    """
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: {value!r} is no JSON value ({error}); give plain JSON"
        ) from error
    if not same:
        raise ValueError(
            f"{name}: {value!r} would change in JSON; give lists for tuples, strings for keys"
        )
    return value


def pack_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Give metrics for JSON, which has no NaN or infinity: those become strings."""
    floats = {name: float(value) for name, value in metrics.items()}
    return {name: v if math.isfinite(v) else str(v) for name, v in floats.items()}


def unpack_metrics(metrics: Mapping[str, float | str]) -> dict[str, float]:
    """Give back what ``pack_metrics`` took."""
    return {name: float(value) for name, value in metrics.items()}
