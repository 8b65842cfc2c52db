"""One door for both directions, and the proof that nothing changed on the way."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rollflow.engines.megatron.start import checkpoint_folder
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import Record
from rollflow.storage.objects import Store

from .config import ConvertConfig
from .distcp import TorchDist
from .plan import planned
from .result import Converted
from .source import fetch_small_files, opened
from .tensor_file import data_of
from .to_hugging_face import to_hugging_face, whole_of
from .to_torch_dist import ORIGIN, to_torch_dist


def convert(config: ConvertConfig) -> Converted:
    """Convert ``config.source``: a Hugging Face folder to torch_dist, a torch_dist checkpoint back.

    Raises:
        ValueError: see :func:`to_torch_dist` and :func:`to_hugging_face`; or, with ``verify``, a
            tensor that came back otherwise, by name.
    """
    started = time.perf_counter()
    source, target = Store(StoreConfig(url=config.source)), Store(StoreConfig(url=config.target))
    is_hugging_face = any(name.endswith(".safetensors") for name in source.children())
    record = (to_torch_dist if is_hugging_face else to_hugging_face)(config, source, target)
    verified = verify(config, target, record) if config.verify else 0
    return Converted(
        kind=record["kind"],
        target=target.root,
        tensors=len(record["tensors"]),
        bytes=sum(file["bytes"] for file in record["files"]),
        resumed_parts=record["resumed_parts"],
        verified=verified,
        seconds=time.perf_counter() - started,
        peak_bytes=_peak_bytes(),
    )


def verify(config: ConvertConfig, target: Store, record: Record) -> int:
    """Read what was written and compare every tensor with the checksum taken from the source.

    Raises:
        ValueError: names the first tensor that differs.
    """
    expected: dict[str, str] = record["tensors"]
    read = _written_torch_dist if record["kind"] == "torch_dist" else _written_hugging_face
    found = 0
    for name, tensor in read(config, target):
        digest = hashlib.sha256(data_of(tensor)).hexdigest()
        if digest != expected.get(name):
            raise ValueError(
                f"{target.root}: {name} has checksum {digest[:12]}, the source "
                f"{str(expected.get(name))[:12]}; convert it again to another target"
            )
        found += 1
    if found != len(expected):
        raise ValueError(f"{target.root} holds {found} of {len(expected)} tensors")
    return found


def _written_torch_dist(config: ConvertConfig, target: Store) -> Iterator[tuple[str, Tensor]]:
    checkpoint = TorchDist(target, checkpoint_folder(target))
    with tempfile.TemporaryDirectory(prefix="rollflow-convert-") as folder:
        fetch_small_files(target, target.join(ORIGIN), Path(folder))
        with planned(Path(folder), trust_remote_code=config.trust_remote_code) as plan:
            for weight in plan.weights:
                yield from whole_of(plan, checkpoint, weight).items()
    checkpoint.close()


def _written_hugging_face(config: ConvertConfig, target: Store) -> Iterator[tuple[str, Tensor]]:
    with opened(target, target.root) as weights:
        for name in weights.names:
            yield name, weights.read(name)


def _peak_bytes() -> int:
    """Most memory that this process had; ``getrusage`` would count what its parent had, too."""
    status = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    return int(peak) * 1024
