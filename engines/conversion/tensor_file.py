"""safetensors files read and written a tensor at a time, from and to any stream.

Nothing is mapped into memory: a file larger than memory costs no more than its largest tensor.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """The tensors of one safetensors file by name."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self._stream, self._url = stream, url
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        self._data_starts = 8 + length
        self._entries = header

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError where the type is none of ``DTYPES``."""
        kind = self._entries[name]["dtype"]
        if kind not in DTYPES:
            raise ValueError(
                f"{self._url}: {name} has type {kind}; supported are {', '.join(DTYPES)}"
            )
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ValueError where the file ends before it."""
        start, end = self._entries[name]["data_offsets"]
        self._stream.seek(self._data_starts + start)
        data = bytearray(end - start)
        if self._stream.readinto(data) != end - start:  # type: ignore[attr-defined]
            raise ValueError(f"{self._url} ends inside {name}; fetch the file again")
        if not data:
            return torch.empty(self.shape(name), dtype=self.dtype(name))
        return torch.frombuffer(data, dtype=self.dtype(name)).view(self.shape(name))

    def close(self) -> None:
        self._stream.close()


class TensorFileWriter:
    """Writes a safetensors file whose tensors come one after the other, in the order announced."""

    def __init__(
        self, stream: BinaryIO, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self._stream = stream
        self._expected = iter(tensors.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        expected = next(self._expected)
        assert expected == (name, (tensor.dtype, tuple(tensor.shape))), (name, expected)
        self._stream.write(data_of(tensor))


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]
