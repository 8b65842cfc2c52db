"""What tests have a process with a trainer rank do, beside the rank's own verbs."""

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from rollflow.engines import meeting
from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.exporter import export_as_rank
from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.megatron.model_parts import unwrapped
from rollflow.engines.megatron.start import LEGACY
from tests.engines.megatron.weights_of_rank import weights_of_rank

weights = weights_of_rank


def save_legacy(rank: TrainerRank, folder: str) -> None:
    """This rank's weights in Megatron's ``torch`` format."""
    [chunk] = [unwrapped(c) for c in rank._rank_live._learner.model.chunks]
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    file = Path(folder) / "iter_0000003" / name / LEGACY
    file.parent.mkdir(parents=True)
    state = {"model": chunk.state_dict(), "args": argparse.Namespace(x=1), "iteration": 3}
    torch.save(state, file)


def export(
    _: TrainerRank | None,
    config: ConvertConfig,
    megatron: dict[str, Any],
    master: str,
    rank: int,
    world_size: int,
) -> None:
    """Be a rank of an export."""
    export_as_rank(config, megatron, meeting.connect_store(master, 60), rank, world_size)
