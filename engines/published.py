"""Weights as a Hugging Face folder, for servers that are not ours: one folder a version.

A folder's marker is written last and says what a server must hold after it has loaded the folder. A
server reads plain files: in a local or shared folder as they are written, in an object store where
its machine has the bucket mounted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef

from . import weights
from .checksums import Named, Tally, server_name

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "rollflow-weights.json"
KEPT = 2
"""Versions that stay: the newest, and the one that servers may still be given until they have it."""
SHARD_BYTES = 4 << 30
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")


@dataclass(frozen=True, slots=True)
class Published:
    """A folder that is whole, e.g. ``Published("/shared/run-1a2b/v000007", 7, "ab12...", {...})``."""

    url: str
    version: int
    digest: str
    """:func:`.checksums.weights_digest` of what it holds."""
    checksums: Mapping[str, str]
    """What ``/weights_checker`` says of a server that has loaded it."""

    @property
    def label(self) -> str:
        """What a server calls these weights: a number alone could be another run's."""
        return f"{self.version}-{self.digest[:12]}"


def version_of(label: str) -> int:
    """The version that a server's label names; ValueError where it names none."""
    return int(label.partition("-")[0])


def place_of(url: str, run: RunRef) -> str:
    """The folder below ``url`` that holds the versions of a run, whatever store the run is in."""
    return f"{url.rstrip('/')}/{run.name}-{hashlib.sha256(run.url.encode()).hexdigest()[:8]}"


class Publication:
    """A version on its way into ``place``: its weights pass by, then :meth:`finish`.

    ``source`` is the folder with configuration and tokenizer, which are copied beside the weights.
    """

    def __init__(self, place: str, version: int, source: Path) -> None:
        self._store = Store(StoreConfig(url=place))
        self._version, self._name = version, f"v{version:06d}"
        local = self._store.local_path(self._name)
        if local is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rollflow-weights-"))
        else:
            self._folder = local.with_name(f".{self._name}.partial")
            shutil.rmtree(self._folder, ignore_errors=True)
        self._files = HuggingFaceFolder(source, self._folder)

    def passing(self, named: Iterable[Named]) -> Iterator[Named]:
        """The same weights, each kept on its way."""
        for name, tensor in named:
            self._files.add(name, tensor)
            yield name, tensor

    def finish(self, digest: str, checksums: Mapping[str, str]) -> Published:
        """Make the version visible, marker last, and remove those that no server needs any more."""
        self._files.finish()
        url = self._store.join(self._name)
        _remove(self._store, self._name)
        local = self._store.local_path(self._name)
        if local is not None:
            self._folder.rename(local)
        else:
            for file in sorted(self._folder.iterdir()):
                self._store.put_file(f"{self._name}/{file.name}", file)
            shutil.rmtree(self._folder)
        record = {"version": self._version, "digest": digest, "checksums": dict(checksums)}
        self._store.put_atomic(f"{self._name}/{MARKER}", json.dumps(record).encode())
        others = [n for n in _versions(self._store) if n != self._name]
        for name in others[: max(0, len(others) + 1 - KEPT)]:
            _remove(self._store, name)
        return Published(url, self._version, digest, checksums)


class HuggingFaceFolder:
    """A Hugging Face checkpoint in the making: safetensors, and the small files of ``source``."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._shards: list[Path] = []
        self._index: dict[str, str] = {}
        self._shard: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of one weight."""
        if sum(t.nbytes for t in self._shard.values()) + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def finish(self) -> None:
        """Write what is left, the index where there are several files, and the small files."""
        self._flush()
        copy_small_files(self._source, self._folder)
        if len(self._shards) == 1:
            self._shards[0].rename(self._folder / "model.safetensors")
            return
        total = sum(shard.stat().st_size for shard in self._shards)
        record = {"metadata": {"total_size": total}, "weight_map": self._index}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(record))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._shard:
            self._shards.append(self._folder / f"model-{len(self._shards) + 1:05d}.safetensors")
            save_file(self._shard, self._shards[-1], metadata={"format": "pt"})
            self._index.update(dict.fromkeys(self._shard, self._shards[-1].name))
        self._shard.clear()


def copy_small_files(source: Path, folder: Path) -> None:
    """Configuration, tokenizer and whatever else stands beside the weights of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_FILES):
            shutil.copyfile(file, folder / file.name)


def find(place: str, version: int) -> Published | None:
    """The version's folder, where it is whole."""
    store = Store(StoreConfig(url=place))
    name = f"v{version:06d}"
    try:
        record = json.loads(store.get(f"{name}/{MARKER}"))
    except FileNotFoundError:
        return None
    return Published(store.join(name), version, record["digest"], record["checksums"])


def publish_files(place: str, version: int, model: Path, dtype: str) -> Published:
    """Publish the weights that a Hugging Face folder holds, in the type in which servers have them."""
    tally = Tally()
    publication = Publication(place, version, model)
    for name, tensor in publication.passing(_weights_of(model, dtype)):
        tally.add(name, tensor)
    return publication.finish(tally.digest(), tally.server_checksums())


def remove_all(place: str) -> None:
    """Remove every version, and what was being written."""
    store = Store(StoreConfig(url=place))
    for name in _versions(store):
        _remove(store, name)
    if local := store.local_path(""):
        shutil.rmtree(local, ignore_errors=True)


def load(url: str, path: str, published: Published, timeout_s: float) -> None:
    """Have the server at ``url`` load the folder, which it sees as ``path``, and verify what it holds.

    Raises:
        WeightMismatchError: it refuses the folder, or holds something else afterwards.
        httpx.TransportError: it does not answer.
    """
    body: dict[str, Any] = {
        "model_path": path,
        "load_format": "auto",
        "weight_version": published.label,
        "abort_all_requests": True,  # what it still works on was asked again elsewhere
        "flush_cache": False,
    }
    with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client:
        answer = client.post("/update_weights_from_disk", json=body)
        if answer.is_error:
            raise weights.WeightMismatchError(
                f"server {url} did not load {path!r}: {answer.text[:300]}; the folder must be "
                "readable there under that name"
            )
        weights.settle(client, published.checksums, published.label)


def _weights_of(model: Path, dtype: str) -> Iterator[Named]:
    """Parts of what servers fuse come in order (q, k, v)."""
    import torch
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    for name in sorted(places, key=server_name):
        with safe_open(places[name], "pt") as opened:
            yield name, opened.get_tensor(name).to(getattr(torch, dtype))


def _versions(store: Store) -> list[str]:
    return [name for name in store.children() if name.startswith("v")]


def _remove(store: Store, name: str) -> None:
    """Marker first: what is half removed must look absent."""
    store.delete(f"{name}/{MARKER}")
    if local := store.local_path(name):
        shutil.rmtree(local, ignore_errors=True)
        return
    for url in store.list(name):
        store.delete(url)
