"""The one object-store client: whole objects, written atomically, on any fsspec URL."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from . import s3
from .config import StoreConfig
from .refusals import StoreRefused, explained, is_missing_bucket
from .retries import with_retries

T = TypeVar("T")
Names = list[str]
Blobs = list[bytes]

NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without hard links answers."""

_CHUNK_BYTES = 8 << 20
_READERS = 16


class Store:
    """Objects below one URL, e.g. ``Store(StoreConfig(url="s3://bucket/prefix"))``.

    Every ``path`` is relative to ``root`` or a URL below it; anything else is a ValueError. A
    reader sees an object complete or not at all. Transient faults are retried within the bounds of
    the config, then raise ``StoreError``; a missing object raises ``FileNotFoundError``; what only a
    person can mend (credentials, a missing bucket, a full disk) raises ``StoreRefused``.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.root = normalised_url(config.url)
        """URL of the store without a slash at the end; a local one is an absolute path."""
        self.config = config.model_copy(update={"url": self.root})
        """The config with the normalised URL: what to hand to another process."""
        self._is_s3 = _protocol(self.root) in s3.PROTOCOLS
        # A cached listing would hide what another process has committed.
        self._options = {"use_listings_cache": False, **_fs_options(self.root, config.options)}
        self._fs = _filesystem(self.root, self._options)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._bulk = s3.BulkReader(config.options)
        if self._is_s3:
            cast(Any, self._fs).retries = 1  # the store's own retries are the only ones

    def join(self, *parts: str) -> str:
        """Give the URL of ``parts`` below the root (the first may itself be a URL below it)."""
        path = "/".join(part.strip("/") if i else part.rstrip("/") for i, part in enumerate(parts))
        if path != self.root and not path.startswith(self.root + "/"):
            if "://" in path or path.startswith("/"):
                raise ValueError(f"path {path!r} is outside of the store {self.root!r}")
            path = f"{self.root}/{path}".rstrip("/")
        if ".." in path.split("/"):
            raise ValueError(f"path {path!r} contains '..'; give a path below the store's root")
        return path

    def run_url(self, name: str) -> str:
        """Give the URL of a run's prefix."""
        return self.join("runs", name)

    def local_path(self, path: str) -> Path | None:
        """Give the object's or folder's place on this machine's disk; None in a remote store."""
        return Path(self.join(path)) if self._local else None

    def put_atomic(self, path: str, data: bytes) -> str:
        """Write an object, replacing one of that name; give its URL. Durable when it returns."""
        if self._local:
            return self._write(
                "write", path, lambda p: _write_local(Path(p), _writes(data), os.replace)
            )
        return self._write(
            "write", path, lambda p: self._fs.pipe_file(p, data, **self._put_options(data))
        )

    def put_new(self, path: str, data: bytes) -> str:
        """Write an object that must not exist yet; give its URL.

        FileExistsError where it exists. Of several writers at once one wins, on a local disk and
        on stores that honour conditional puts (``If-None-Match: *``); elsewhere an existing object
        is only refused when it is already visible. After a fault whose answer got lost an own
        write may be refused too: compare what is there.
        """
        if self._local:
            return self._write(
                "create", path, lambda p: _write_local(Path(p), _writes(data), _link_or_look)
            )
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, "object exists already", self.join(path))
        return self.put_if_absent(path, data)

    def put_if_absent(self, path: str, data: bytes) -> str:
        """Write an object on no other condition than the store's own; give its URL.

        FileExistsError where the store refuses it. A store that ignores conditions writes it; a
        disk without hard links raises OSError.
        """
        if self._local:
            return self._write(
                "create", path, lambda p: _write_local(Path(p), _writes(data), _link)
            )
        try:
            return self._write(
                "create",
                path,
                lambda p: self._fs.pipe_file(p, data, mode="create", **self._put_options(data)),
            )
        except OSError as error:  # a refused condition is EINVAL where the server does not name it
            if error.errno == errno.EINVAL and self.exists(path):
                raise FileExistsError(errno.EEXIST, str(error), self.join(path)) from error
            raise

    def put_file(self, path: str, source: Path) -> str:
        """Write a local file's bytes as an object without holding them in memory; give its URL."""
        if self._local:
            return self._write(
                "write", path, lambda p: _write_local(Path(p), _copies(source), os.replace)
            )
        if self._is_s3 and source.stat().st_size < s3.SINGLE_PUT_BYTES:
            return self.put_atomic(path, source.read_bytes())
        size = {"chunksize": s3.PART_BYTES} if self._is_s3 else {}
        return self._write("write", path, lambda p: self._fs.put_file(str(source), p, **size))

    def get(self, path: str) -> bytes:
        """Read a whole object."""
        return self._call("read", path, self._fs.cat_file)

    def get_buffer(self, path: str) -> pa.Buffer:
        """Read a whole object of many megabytes by the fastest way there is to it."""
        if self._is_s3:
            fs_path = cast(str, self._fs._strip_protocol(self.join(path)))
            if (buffer := self._bulk.read(fs_path)) is not None:
                return buffer
        return pa.py_buffer(self.get(path))

    def arrow_place(self, path: str) -> tuple[pafs.FileSystem, str]:
        """Give what pyarrow needs to scan an object by columns: a file system and a path in it."""
        fs_path = cast(str, self._fs._strip_protocol(self.join(path)))
        if self._local:
            return pafs.LocalFileSystem(use_mmap=True), fs_path
        if self._is_s3:
            return self._bulk.filesystem(), fs_path
        return pafs.PyFileSystem(pafs.FSSpecHandler(self._fs)), fs_path

    def get_all(self, paths: Sequence[str]) -> Blobs:
        """Read many small objects at once, in the order of ``paths``."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.get, paths))

    def get_file(self, path: str, target: Path) -> None:
        """Read an object into a local file, whose folder is made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._call("read", path, lambda p: self._fs.get_file(p, str(target)))

    def checksum(self, path: str) -> tuple[int, str]:
        """Give an object's size in bytes and its sha256, reading it as a stream."""

        def read(p: str) -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            with self._fs.open(p, "rb") as stream:
                while block := cast(bytes, stream.read(_CHUNK_BYTES)):
                    digest.update(block)
                    size += len(block)
            return size, digest.hexdigest()

        return self._call("read", path, read)

    def fingerprint(self, path: str) -> str:
        """Give a value that changes when the object is written anew, without reading it."""
        return self._call("look up", path, lambda p: str(self._fs.ukey(p)))

    def exists(self, path: str) -> bool:
        """Tell whether there is an object (or a folder with one) of that name."""
        return self._call("look up", path, self._fs.exists)

    def list(self, prefix: str = "") -> Names:
        """Give the URLs of all objects in folder ``prefix``, at any depth, in order of name."""
        found = self._call("list", prefix, self._fs.find)
        return sorted(self._url(p) for p in found if not _is_temporary(p))

    def children(self, prefix: str = "") -> Names:
        """Give the names of what stands directly in folder ``prefix``, in order; [] if absent."""

        def names(p: str) -> Names:
            try:
                return self._fs.ls(p, detail=False)
            except FileNotFoundError as error:
                if is_missing_bucket(error):
                    raise
                return []

        found = self._call("list", prefix, names)
        leaves = {p.rstrip("/").rpartition("/")[2] for p in found if not _is_temporary(p)}
        return sorted(leaves)

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is no error."""

        def remove(p: str) -> None:
            try:
                self._fs.rm_file(p)
            except FileNotFoundError:
                return

        self._call("delete", path, remove)

    def temporaries(self, prefix: str = "") -> Names:
        """Give the URLs of the temporary files in a folder, at any depth: no objects yet."""
        found = self._call("list", prefix, self._fs.find)
        return sorted(self._url(p) for p in found if _is_temporary(p))

    def sweep(self, prefix: str = "") -> Names:
        """Delete the temporary files that killed writers left in a folder; give their URLs.

        A writer that still lives, whose file it takes, writes it again.
        """
        leftovers = self.temporaries(prefix)
        for url in leftovers:
            self.delete(url)
        return leftovers

    def open_input(self, url: str) -> BinaryIO:
        """Open any URL, in this store or not, for reading; ``.gz`` and the like are decompressed.

        A local path may be relative to the working directory. The store's options are used where
        the URL has the store's protocol.
        """
        url = normalised_url(url)
        options = self._options if _protocol(url) == _protocol(self.root) else {}

        def opened() -> BinaryIO:
            file = fsspec.open(url, "rb", compression="infer", **options)
            return cast(fsspec.core.OpenFile, file).open()

        return self._retry("open", url, opened)

    def _url(self, fs_path: str) -> str:
        if self._local:
            return fs_path
        return f"{_protocol(self.root)}://{fs_path.lstrip('/')}"

    def _write(self, verb: str, path: str, call: Callable[[str], object]) -> str:
        self._call(verb, path, call)
        return self.join(path)

    def _call(self, verb: str, path: str, call: Callable[[str], T]) -> T:
        url = self.join(path)
        fs_path = self._fs._strip_protocol(url)
        return self._retry(verb, url, lambda: call(cast(str, fs_path)))

    def _retry(self, verb: str, url: str, call: Callable[[], T]) -> T:
        what = f"store: {verb} {url}"
        try:
            return with_retries(
                call,
                what=what,
                max_retries=self.config.max_retries,
                backoff_s=self.config.retry_backoff_s,
            )
        except Exception as error:
            if clear := explained(error, what, url):
                raise clear from error
            raise

    def _put_options(self, data: bytes) -> dict[str, Any]:
        return s3.put_options(data) if self._is_s3 else {}


def normalised_url(url: str) -> str:
    """Give ``url`` without a slash at the end; a local one as an absolute path.

    >>> normalised_url("s3://bucket/prefix/")
    's3://bucket/prefix'
    """
    if "::" in url:
        raise ValueError(f"url {url!r} is a chained fsspec URL; give the URL of the store itself")
    if _protocol(url) in ("file", "local"):
        return str(LocalFileSystem._strip_protocol(url)).rstrip("/")
    scheme, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise ValueError(f"url {url!r} names no place; give {scheme}://<bucket or folder>")
    return f"{scheme}://{rest.strip('/')}"


def _filesystem(url: str, options: dict[str, Any]) -> Any:
    try:
        filesystem, _ = fsspec.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:  # no such protocol, or its package is missing
        raise StoreRefused(
            f"store.url = {url!r}: {error}; give a folder, s3://bucket/prefix or another URL of fsspec"
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        for place in (Path(url), *Path(url).parents):
            if place.is_file():
                raise StoreRefused(f"store.url = {url!r}: {place} is a file; give a folder")
    return filesystem


def _fs_options(url: str, options: dict[str, Any]) -> dict[str, Any]:
    return s3.filesystem_options(options) if _protocol(url) in s3.PROTOCOLS else dict(options)


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"


def _is_temporary(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def _writes(data: bytes) -> Callable[[BinaryIO], object]:
    return lambda stream: stream.write(data)


def _copies(source: Path) -> Callable[[BinaryIO], object]:
    def copy(stream: BinaryIO) -> None:
        with source.open("rb") as origin:
            shutil.copyfileobj(origin, stream, _CHUNK_BYTES)

    return copy


def _write_local(
    path: Path, fill: Callable[[BinaryIO], object], publish: Callable[[Path, Path], object]
) -> None:
    """Fill a temporary file beside ``path``, make it durable, then give it its name at once."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            publish(temporary, path)
        except FileNotFoundError as error:  # swept away by another: a fault that passes
            raise InterruptedError(errno.EINTR, f"{error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Publish without replacing: a hard link fails where the name exists already."""
    path.hardlink_to(temporary)


def _link_or_look(temporary: Path, path: Path) -> None:
    """Publish by a hard link; where there are none a name is only refused when it is visible."""
    try:
        _link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "object exists already", str(path)) from error
        temporary.replace(path)


def _make_folder(folder: Path) -> None:
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
