"""torch_dist checkpoints, a part at a time: PyTorch's distributed checkpoint with megatron-core's names.

The index of such a checkpoint is a pickle. It is read by an unpickler that knows the few classes
that belong there and refuses everything else; tensors are read as tensors alone.
"""

import io
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rollflow.engines.megatron.start import INDEX
from rollflow.storage.objects import Store

from .plan import Region, Weight
from .tensor_file import DTYPES

CONFIG = "metadata.json"
COMMON = "common.pt"
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
_TRUSTED: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *_DTYPES},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where a block of a tensor lies."""

    key: str
    offset: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDist:
    """An existing torch_dist checkpoint."""

    def __init__(self, store: Store, url: str) -> None:
        self._store, self._url = store, url
        try:
            data = store.get(store.join(url, INDEX))
        except FileNotFoundError as error:
            raise ValueError(f"{url} has no {INDEX}: it is no torch_dist checkpoint") from error
        self._index: Metadata = _SafeUnpickler(io.BytesIO(data), url).load()
        self._streams: dict[str, BinaryIO] = {}

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor, or None if there is none of that name."""
        entry = self._index.state_dict_metadata.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def dtype(self, key: str) -> torch.dtype:
        entry = self._index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def read(self, region: Region) -> Tensor:
        """A block of a tensor, put together from whatever chunks overlap it.

        Raises:
            ValueError: no chunk holds some of it.
        """
        entry = self._index.state_dict_metadata[region.key]
        assert isinstance(entry, TensorStorageMetadata)
        found = torch.empty(region.shape, dtype=entry.properties.dtype)
        missing = found.numel()
        for chunk in entry.chunks:
            inside, into = _overlap(chunk, region)
            if inside is None:
                continue
            piece = self._chunk(region.key, chunk)[inside]
            found[into] = piece
            missing -= piece.numel()
        if missing:
            raise ValueError(
                f"{self._url}: {missing} elements of {region.key} at {region.offset} are in no chunk"
            )
        return found

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place: _StorageInfo = self._index.storage_data[MetadataIndex(key, chunk.offsets)]
        if place.relative_path not in self._streams:
            url = self._store.join(self._url, place.relative_path)
            self._streams[place.relative_path] = self._store.open_input(url)
        stream = self._streams[place.relative_path]
        stream.seek(place.offset)
        tensor = torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)
        return tensor.view(chunk.sizes)


def write_chunks(
    stream: BinaryIO, file: str, chunks: Iterable[tuple[Region, Tensor]]
) -> list[StoredChunk]:
    """Append blocks to a part; where each lies."""
    stored: list[StoredChunk] = []
    for region, tensor in chunks:
        start = stream.tell()
        torch.save(tensor.contiguous().view(region.shape), stream)
        stored.append(StoredChunk(region.key, region.offset, file, start, stream.tell() - start))
    return stored


def index_of(
    weights: Sequence[Weight], dtypes: dict[str, torch.dtype], stored: Iterable[StoredChunk]
) -> bytes:
    """The index of a checkpoint whose parts are written."""
    tensors: dict[str, Any] = {}
    for region in (r for weight in weights for r in weight.regions):
        entry = tensors.setdefault(
            region.key,
            TensorStorageMetadata(
                TensorProperties(dtype=dtypes[region.key]), torch.Size(region.whole), []
            ),
        )
        entry.chunks.append(
            ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
        )
    places = {
        MetadataIndex(s.key, torch.Size(s.offset)): _StorageInfo(s.file, s.start, s.length)
        for s in stored
    }
    index = Metadata(state_dict_metadata=tensors, storage_data=places, version=CURRENT_DCP_VERSION)
    return pickle.dumps(index)


def config_of() -> bytes:
    """What tells megatron-core the format."""
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    return json.dumps(backends | versions).encode()


def common_of(common: dict[str, Any]) -> bytes:
    """What belongs to no tensor."""
    stream = io.BytesIO()
    torch.save(common, stream)
    return stream.getvalue()


def _overlap(chunk: ChunkStorageMetadata, region: Region) -> tuple[Any, Any]:
    """(slices of the chunk, slices of the region) that are the same elements, or (None, None)."""
    inside: list[slice] = []
    into: list[slice] = []
    bounds = zip(chunk.offsets, chunk.sizes, region.offset, region.shape, strict=True)
    for chunk_start, chunk_size, start, size in bounds:
        first, last = max(chunk_start, start), min(chunk_start + chunk_size, start + size)
        if first >= last:
            return None, None
        inside.append(slice(first - chunk_start, last - chunk_start))
        into.append(slice(first - start, last - start))
    return tuple(inside), tuple(into)


class _SafeUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, url: str) -> None:
        super().__init__(stream)
        self._url = url

    def find_class(self, module: str, name: str) -> Any:
        """Only what an index is made of."""
        if name in _TRUSTED.get(module, set()):
            return super().find_class(module, name)
        raise ValueError(
            f"{self._url}/{INDEX} asks for {module}.{name}, which no checkpoint index needs; "
            "it is not read"
        )
