"""Any Megatron checkpoint -> Hugging Face, by the exporter of the weight sync, at any parallel size.

Every process is one rank of a trainer, started by torchrun or as a Ray actor. The checkpoint is
torch_dist (its layout is free) or Megatron's older ``torch`` format, one file for each model parallel
rank (the ranks must be laid out as the saver's were).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rollflow.engines import meeting
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron import parallel
from rollflow.engines.megatron.export import save_hugging_face
from rollflow.engines.megatron.model import Model, build_model, read_hf_config
from rollflow.engines.megatron.settings import split_settings
from rollflow.engines.megatron.start import load_weights
from rollflow.engines.platform import detect
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store

from .config import ConvertConfig
from .to_hugging_face import fetch_origin

TIMEOUT_S = 1800.0


def export_under_torchrun(config: ConvertConfig, megatron: dict[str, Any]) -> None:
    """Take part as the rank that torchrun's environment names.

    Raises:
        ValueError: see :func:`export_as_rank`.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's own store listens there already.
    store = meeting.connect_store(f"{host}:{port}", TIMEOUT_S)
    export_as_rank(config, megatron, store, rank, world_size)


def export_as_rank(
    config: ConvertConfig, megatron: dict[str, Any], store: Any, rank: int, world_size: int
) -> None:
    """Load this rank's part and gather it with the others' into ``config.target``; rank 0 writes.

    Raises:
        ValueError: the ranks cannot be laid out so, or the source holds no checkpoint for them.
    """
    platform = detect()
    settings = split_settings(megatron)
    settings.data_parallel(world_size)
    parallel.join(store, rank, world_size, backend=platform.backend, timeout_s=TIMEOUT_S)
    parallel.make_groups(settings, 0, timeout_s=TIMEOUT_S)
    source, target = Store(StoreConfig(url=config.source)), Store(StoreConfig(url=config.target))
    try:
        with tempfile.TemporaryDirectory(prefix="rollflow-convert-") as here:
            origin, folder = Path(here) / "origin", Path(here) / "result"
            fetch_origin(config, source, origin)
            model = _loaded(source, origin, config, settings, platform.device)
            save_hugging_face(model, str(origin), folder, write=rank == 0)
            for file in sorted(folder.iterdir()) if rank == 0 else ():
                target.put_file(file.name, file)
            dist.barrier()
    finally:
        parallel.leave()


def _loaded(
    source: Store, origin: Path, config: ConvertConfig, settings: Any, device: str
) -> Model:
    hf = ModelConfig(
        path=str(origin), random_weights=True, trust_remote_code=config.trust_remote_code
    )
    dtype = getattr(read_hf_config(hf), "dtype", None) or torch.float32
    hf = hf.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    model = build_model(hf, settings, device, trained=False)
    load_weights(model, source.root)
    return model
