"""A Hugging Face checkpoint at any URL: its small files here, its tensors one at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rollflow.storage.objects import Store

from .tensor_file import TensorFile

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json")
SMALL_BYTES = 256 << 20
"""Files beside the weights that are larger are no configuration or tokenizer."""


class HuggingFaceSource:
    """The tensors of all safetensors files under a folder, by name."""

    def __init__(self, store: Store, url: str) -> None:
        self._store = store
        files = sorted(f for f in store.list(url) if f.endswith(".safetensors"))
        if not files:
            raise ValueError(f"{url} has no *.safetensors; give a Hugging Face folder")
        self._files = [TensorFile(store.open_input(file), file) for file in files]
        self._of = {name: file for file in self._files for name in file.names}
        self.bytes = sum(
            self.dtype(n).itemsize * int(torch.Size(self.shape(n)).numel()) for n in self._of
        )

    @property
    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._of[name].read(name)

    def close(self) -> None:
        for file in self._files:
            file.close()


@contextlib.contextmanager
def opened(store: Store, url: str) -> Iterator[HuggingFaceSource]:
    """The source, its files open."""
    source = HuggingFaceSource(store, url)
    try:
        yield source
    finally:
        source.close()


def fetch_small_files(store: Store, url: str, folder: Path) -> list[str]:
    """Bring configuration, tokenizer and whatever stands beside the weights here; their names.

    Raises:
        ValueError: there is no config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    prefix = store.join(url).rstrip("/") + "/"
    for file in store.list(url):
        name = store.join(file).removeprefix(prefix)
        if "/" in name or name.endswith(WEIGHTS) or name == "manifest.json":
            continue
        store.get_file(file, folder / name)
        if (folder / name).stat().st_size > SMALL_BYTES:
            (folder / name).unlink()
            continue
        names.append(name)
    if "config.json" not in names:
        raise ValueError(f"{url} has no config.json; give a folder that has one")
    return sorted(names)
