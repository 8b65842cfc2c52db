"""Hugging Face -> torch_dist, one tensor in memory at a time, without any flag about the model."""

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rollflow.engines.megatron.loading import check_shapes
from rollflow.engines.megatron.rotary import rotary_args
from rollflow.engines.megatron.start import INDEX, TRACKER
from rollflow.storage.integrity import Record, json_digest
from rollflow.storage.objects import Store

from . import distcp, parts
from .config import ConvertConfig
from .plan import Plan, Region, Weight, planned
from .source import HuggingFaceSource, fetch_small_files, opened
from .tensor_file import data_of

RELEASE = "release"
"""Megatron's name of a checkpoint that belongs to no iteration; its tracker file says so."""
ORIGIN = "huggingface"
"""Configuration and tokenizer of the source, so that the way back needs nothing else."""


def to_torch_dist(config: ConvertConfig, source: Store, target: Store) -> Record:
    """Convert; the manifest. Goes on where an interrupted conversion stopped.

    Raises:
        ValueError: config.json is not the one of the weights (names the tensor and both shapes),
            an architecture is not supported, or the target holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="rollflow-convert-") as folder:
        origin = Path(folder)
        names = fetch_small_files(source, source.root, origin)
        with (
            opened(source, source.root) as weights,
            planned(origin, trust_remote_code=config.trust_remote_code) as plan,
        ):
            found = {name: weights.shape(name) for name in weights.names}
            check_shapes(found, plan.shapes, source.root)
            signature = json_digest([_identity(source), config.part_bytes, "torch_dist"])
            if standing := parts.standing_manifest(target, signature):
                return standing
            for name in names:
                target.put_atomic(target.join(ORIGIN, name), (origin / name).read_bytes())
            return _convert(config, target, signature, plan, weights)


def _convert(
    config: ConvertConfig, target: Store, signature: str, plan: Plan, source: HuggingFaceSource
) -> Record:
    records: list[Record] = []
    resumed = 0

    def write(stream: BinaryIO, file: str, weights: Sequence[Weight]) -> dict[str, Any]:
        digests: dict[str, str] = {}
        chunks = distcp.write_chunks(
            stream, file.rpartition("/")[2], _blocks(plan, source, weights, digests)
        )
        places = [[c.key, list(c.offset), c.file, c.start, c.length] for c in chunks]
        return {"tensors": digests, "chunks": places}

    def size_of(weight: Weight) -> int:
        return sum(
            source.dtype(n).itemsize * torch.Size(s).numel() for n, s in weight.parts.items()
        )

    for number, weights in enumerate(parts.cut(plan.weights, size_of, config.part_bytes)):
        file = f"{RELEASE}/__{number}_0.distcp"
        record, stood = parts.write_part(target, number, file, signature, weights, write)
        records.append(record)
        resumed += stood
    stored = [
        distcp.StoredChunk(k, tuple(o), *rest) for r in records for k, o, *rest in r["chunks"]
    ]
    dtypes = {r.key: source.dtype(next(iter(w.parts))) for w in plan.weights for r in w.regions}
    common = {"args": _arguments(plan), "iteration": 0, "checkpoint_version": 3.0}
    target.put_atomic(f"{RELEASE}/{distcp.COMMON}", distcp.common_of(common))
    target.put_atomic(f"{RELEASE}/{distcp.CONFIG}", distcp.config_of())
    target.put_atomic(f"{RELEASE}/{INDEX}", distcp.index_of(plan.weights, dtypes, stored))
    target.put_atomic(TRACKER, RELEASE.encode())
    for record in records:
        record.pop("chunks")
    facts = {"kind": "torch_dist", "resumed_parts": resumed}
    return parts.commit(target, signature, records, facts)


def _blocks(
    plan: Plan, source: HuggingFaceSource, weights: Sequence[Weight], digests: dict[str, str]
) -> Iterator[tuple[Region, Tensor]]:
    for weight in weights:
        tensors: list[Tensor] = []
        for name in weight.parts:
            tensors.append(source.read(name))
            digests[name] = hashlib.sha256(data_of(tensors[-1])).hexdigest()
        whole = plan.to_megatron(weight, tensors)
        yield from zip(weight.regions, whole.chunk(len(weight.regions)), strict=True)


def _identity(source: Store) -> list[list[str]]:
    """Changes with any file of the source."""
    return [[url.removeprefix(source.root), source.fingerprint(url)] for url in source.list()]


def _arguments(plan: Plan) -> argparse.Namespace:
    """Megatron-LM's arguments of the model, for its ``--use-checkpoint-args``."""
    made, hf_config = plan.bridge.config, plan.bridge.hf_config
    rotary = rotary_args(hf_config)
    arguments: dict[str, Any] = {
        "num_layers": made.num_layers,
        "hidden_size": made.hidden_size,
        "ffn_hidden_size": made.ffn_hidden_size,
        "num_attention_heads": made.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": made.num_query_groups,
        "kv_channels": made.kv_channels,
        "max_position_embeddings": hf_config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": rotary["rotary_base"],
        "rotary_percent": rotary["rotary_percent"],
        "rotary_interleaved": made.rotary_interleaved,
        "normalization": made.normalization,
        "norm_epsilon": made.layernorm_epsilon,
        "swiglu": made.gated_linear_unit,
        "add_bias_linear": made.add_bias_linear,
        "add_qkv_bias": made.add_qkv_bias,
        "qk_layernorm": made.qk_layernorm,
        "untie_embeddings_and_output_weights": not hf_config.tie_word_embeddings,
        "padded_vocab_size": hf_config.vocab_size,
        "num_experts": made.num_moe_experts,
        "moe_ffn_hidden_size": made.moe_ffn_hidden_size,
        "moe_router_topk": made.moe_router_topk,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "iteration": 0,
    }
    return argparse.Namespace(**arguments)
