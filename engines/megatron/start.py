"""First weights from any kind of checkpoint: Hugging Face, torch_dist, or Megatron's ``torch`` format."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store

from .loading import load_hugging_face
from .model import Model
from .model_parts import unwrapped

INDEX = ".metadata"
"""File that makes a folder a torch_dist checkpoint."""
LEGACY = "model_optim_rng.pt"
"""File of one model parallel rank in Megatron's ``torch`` format."""
_EXTRA = "_extra_state"
TRACKER = "latest_checkpointed_iteration.txt"


def load_weights(model: Model, url: str) -> None:
    """Replace the model's weights by those of a checkpoint, without optimizer or schedule.

    A torch_dist checkpoint may have been saved at any layout; the ``torch`` format only at this one.

    Raises:
        ValueError: there is no checkpoint, or its tensors are not those of the model.
    """
    source = Store(StoreConfig(url=url))
    chunks = [unwrapped(chunk) for chunk in model.chunks]
    if any(name.endswith(".safetensors") for name in source.children()):
        with tempfile.TemporaryDirectory(prefix="rollflow-load-") as here:
            folder = _local(source, source.root, Path(here))
            with cuda_means_cpu():
                load_hugging_face(model.bridge, chunks, str(folder))
        return
    legacy = [u for u in source.list() if u.endswith(f"/{LEGACY}")]
    with cuda_means_cpu():
        if legacy:
            [chunk] = chunks
            chunk.load_state_dict(_legacy_state(source, legacy), strict=True)
            return
        with tempfile.TemporaryDirectory(prefix="rollflow-load-") as here, _megatron_arguments():
            folder = _local(source, checkpoint_folder(source), Path(here))
            state = chunks[0].sharded_state_dict()
            # States that some layers' implementations keep beside their weights; empty in ours.
            wanted = {k: v for k, v in state.items() if not k.endswith(_EXTRA)}
            loaded: Any = dist_checkpointing.load({"model": wanted}, str(folder))
        missing, extra = chunks[0].load_state_dict(loaded["model"], strict=False)
        if wrong := [*extra, *(name for name in missing if not name.endswith(_EXTRA))]:
            raise ValueError(f"{url}: {wrong[0]} is not a parameter of both model and checkpoint")


def checkpoint_folder(source: Store) -> str:
    """Where under the source the torch_dist files are: there, or in the folder its tracker names.

    Raises:
        ValueError: there is none, or several and no tracker.
    """
    found = [u.removesuffix(f"/{INDEX}") for u in source.list() if u.endswith(f"/{INDEX}")]
    if len(found) > 1 and source.exists(TRACKER):
        name = source.get(TRACKER).decode().strip()
        name = name if name == "release" else f"iter_{int(name):07d}"
        found = [f for f in found if f.rpartition("/")[2] == name]
    if not found:
        raise ValueError(f"{source.root} holds neither *.safetensors nor a torch_dist checkpoint")
    if len(found) > 1:
        raise ValueError(
            f"{source.root} holds {len(found)} torch_dist checkpoints; give the folder of one, "
            f"e.g. {found[-1]}"
        )
    return found[0]


def _legacy_state(source: Store, files: list[str]) -> dict[str, Any]:
    tensor = parallel_state.get_tensor_model_parallel_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tensor:02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{pipeline:03d}"
    own = [f for f in files if f.split("/")[-2] == name]
    if len(own) != 1:
        raise ValueError(
            f"{source.root} holds {len(own)} files {name}/{LEGACY}; give the folder of one "
            "iteration, and lay the ranks out as the saver's were"
        )
    with source.open_input(own[0]) as stream, _megatron_arguments():
        state = torch.load(stream, map_location="cpu", weights_only=True)["model"]
    return {k: v for k, v in state.items() if not k.endswith(_EXTRA)}


def _megatron_arguments() -> Any:
    """Megatron keeps its arguments in a checkpoint: allow their class, and no other, while loading."""
    return torch.serialization.safe_globals([argparse.Namespace])


def _local(source: Store, folder: str, staging: Path) -> Path:
    """The folder on this machine's disk: its own, or a copy."""
    if own := source.local_path(folder):
        return own
    for url in source.list(folder):
        source.get_file(url, staging / url.removeprefix(folder).lstrip("/"))
    return staging
