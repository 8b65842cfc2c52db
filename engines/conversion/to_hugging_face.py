"""torch_dist -> Hugging Face, from any parallel layout, one tensor in memory at a time."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rollflow.engines.megatron.start import INDEX, checkpoint_folder
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import Record, json_digest
from rollflow.storage.objects import Store

from . import parts
from .config import ConvertConfig
from .distcp import TorchDist
from .plan import Plan, Weight, planned
from .source import fetch_small_files
from .tensor_file import TensorFileWriter, data_of
from .to_torch_dist import ORIGIN

INDEX_FILE = "model.safetensors.index.json"


def to_hugging_face(config: ConvertConfig, source: Store, target: Store) -> Record:
    """Convert; the manifest. Goes on where an interrupted conversion stopped.

    Raises:
        ValueError: the checkpoint holds no configuration and ``config.model`` names none, a tensor
            is missing or has another shape than config.json asks for, or the target holds
            something else.
    """
    folder = checkpoint_folder(source)
    with tempfile.TemporaryDirectory(prefix="rollflow-convert-") as here:
        origin = Path(here)
        names = fetch_origin(config, source, origin)
        checkpoint = TorchDist(source, folder)
        try:
            with planned(origin, trust_remote_code=config.trust_remote_code) as plan:
                check_regions(plan, checkpoint, source.root)
                index = source.join(folder, INDEX)
                identity = [source.fingerprint(index), (origin / "config.json").read_text()]
                signature = json_digest([identity, config.shard_bytes, "huggingface"])
                if standing := parts.standing_manifest(target, signature):
                    return standing
                for name in names:
                    target.put_atomic(name, (origin / name).read_bytes())
                return _convert(config, target, signature, plan, checkpoint)
        finally:
            checkpoint.close()


def check_regions(plan: Plan, checkpoint: TorchDist, url: str) -> None:
    """Every tensor that config.json asks for is in the checkpoint, in its shape.

    Raises:
        ValueError: names the tensor and both shapes.
    """
    for region in (r for weight in plan.weights for r in weight.regions):
        found = checkpoint.shape(region.key)
        if found is None:
            raise ValueError(
                f"{url}: {region.key} is missing; config.json asks for {list(region.whole)}"
            )
        # Tensor parallel ranks may have padded the vocabulary.
        padded = region.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        fits = found[1:] == region.whole[1:] and found[0] >= region.whole[0]
        if found != region.whole and not (padded and fits):
            raise ValueError(
                f"{url}: {region.key} has shape {list(found)}, config.json asks for "
                f"{list(region.whole)}; the configuration is not the one of these weights"
            )


def whole_of(plan: Plan, checkpoint: TorchDist, weight: Weight) -> dict[str, Tensor]:
    """The Hugging Face tensors of a parameter, read from the checkpoint."""
    blocks = [checkpoint.read(region) for region in weight.regions]
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return plan.to_hugging_face(weight, whole.view(weight.shape))


def _convert(
    config: ConvertConfig, target: Store, signature: str, plan: Plan, checkpoint: TorchDist
) -> Record:
    def dtype_of(weight: Weight) -> torch.dtype:
        return checkpoint.dtype(weight.regions[0].key)

    def size_of(weight: Weight) -> int:
        numbers = sum(torch.Size(shape).numel() for shape in weight.parts.values())
        return numbers * dtype_of(weight).itemsize

    def write(stream: BinaryIO, file: str, weights: Sequence[Weight]) -> dict[str, Any]:
        announced = {n: (dtype_of(w), shape) for w in weights for n, shape in w.parts.items()}
        out = TensorFileWriter(stream, announced)
        digests: dict[str, str] = {}
        for weight in weights:
            for name, tensor in whole_of(plan, checkpoint, weight).items():
                out.write(name, tensor)
                digests[name] = hashlib.sha256(data_of(tensor)).hexdigest()
        return {"tensors": digests}

    shards = parts.cut(plan.weights, size_of, config.shard_bytes)
    records: list[Record] = []
    resumed = 0
    for number, weights in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        record, stood = parts.write_part(target, number, file, signature, weights, write)
        records.append(record)
        resumed += stood
    if len(shards) > 1:
        total = sum(size_of(weight) for weight in plan.weights)
        where = {name: r["file"] for r in records for name in r["tensors"]}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        target.put_atomic(INDEX_FILE, json.dumps(index, indent=1).encode())
    facts = {"kind": "huggingface", "resumed_parts": resumed}
    return parts.commit(target, signature, records, facts)


def fetch_origin(config: ConvertConfig, source: Store, folder: Path) -> list[str]:
    """Configuration and tokenizer: those that are given, or those kept with the checkpoint."""
    if config.model:
        given = Store(StoreConfig(url=config.model))
        return fetch_small_files(given, given.root, folder)
    for name in (ORIGIN, "hf"):
        kept = [u for u in source.list() if u.endswith(f"/{name}/config.json")]
        if kept:
            return fetch_small_files(source, kept[0].rpartition("/")[0], folder)
    raise ValueError(
        f"{source.root} has no configuration of the model beside it; name a folder with "
        "config.json and tokenizer by --model"
    )
