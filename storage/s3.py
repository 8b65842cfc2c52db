"""S3: how s3fs is set up for it, and reading whole objects by pyarrow's own client, which is faster.

s3fs is the client that everything goes through. It sends and checks, retries nothing by itself (the
store does) and finds credentials in the environment or the provider's standard chain.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

PART_BYTES = 16 << 20
SINGLE_PUT_BYTES = 2 * PART_BYTES
"""From so many bytes on an object goes up in parts, and becomes visible with the last."""

PROTOCOLS = ("s3", "s3a")
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0

_BULK_OPTIONS = {"endpoint_url", "client_kwargs", "config_kwargs", "use_ssl", "anon"}
"""Options of s3fs that pyarrow can be given too; with others everything goes through s3fs."""
_PLAIN_CHECKSUMS = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
"""Many servers besides AWS answer S3's newer checksums with wrong data or refuse them. Content-MD5
guards their puts instead, and the store's own sha256 every read."""


def filesystem_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the user's options for s3fs with what is good for every store laid below them."""
    config: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
    }
    if endpoint(options) and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        config |= _PLAIN_CHECKSUMS
    given = dict(options)
    return {**given, "config_kwargs": {**config, **given.get("config_kwargs", {})}}


def endpoint(options: Mapping[str, Any]) -> str:
    """Give the URL of the server where it is not AWS; '' otherwise."""
    return (
        options.get("endpoint_url")
        or options.get("client_kwargs", {}).get("endpoint_url")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL", "")
    )


def put_options(data: bytes) -> dict[str, Any]:
    """Give what a put is sent with: the size of its parts, or the checksum of a single one."""
    if len(data) >= SINGLE_PUT_BYTES:
        return {"chunksize": PART_BYTES}
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return {"chunksize": PART_BYTES, "ContentMD5": base64.b64encode(digest).decode()}


class BulkReader:
    """Reads whole objects by pyarrow, as long as that works."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._filesystem: pafs.FileSystem | None = None
        self._is_usable = set(options) <= _BULK_OPTIONS

    def read(self, path: str) -> pa.Buffer | None:
        """Give an object's bytes; None where s3fs must be asked, for the bytes or for the reason."""
        if not self._is_usable:
            return None
        try:
            with self.filesystem().open_input_file(path) as file:
                return file.read_buffer()
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException):  # a server or a setting that only s3fs can handle
            self._is_usable = False
            return None

    def filesystem(self) -> pafs.FileSystem:
        """Give pyarrow's client of the same server; ValueError where an option is unknown to it."""
        if unknown := sorted(set(self._options) - _BULK_OPTIONS):
            raise ValueError(f"store.options: {unknown[0]!r} is no option that scans can use")
        if self._filesystem is None:
            client = self._options.get("client_kwargs", {})
            scheme, _, host = endpoint(self._options).rpartition("://")
            region = client.get("region_name") or os.environ.get("AWS_REGION")
            self._filesystem = pafs.S3FileSystem(
                endpoint_override=host.rstrip("/") or None,
                scheme=scheme or ("https" if self._options.get("use_ssl", True) else "http"),
                region=region or os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
                anonymous=bool(self._options.get("anon", False)),
                connect_timeout=CONNECT_TIMEOUT_S,
                request_timeout=READ_TIMEOUT_S,
            )
        return self._filesystem
