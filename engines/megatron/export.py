"""The policy's weights under their Hugging Face names, in whole tensors.

Pipeline stages and tensor parallel parts are gathered, so every rank must iterate to the end.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rollflow.engines.cpu.megatron import cuda_means_cpu
from rollflow.engines.published import HuggingFaceFolder

from .model import Model
from .model_parts import unwrapped


def export_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight; parts of what servers fuse come in order (q, k, v).

    A tensor may be the model's own: copy it to keep it. Weights that two pipeline stages hold, tied
    embeddings, come once.
    """
    weights = _whole_weights(model) if _holds_all(model) else _gathered_weights(model)
    seen: set[str] = set()
    while True:
        # Entered anew each time: the consumer's own work is not megatron-core's.
        with cuda_means_cpu(), torch.no_grad():
            item = next(weights, None)
        if item is None:
            return
        if item[0] not in seen:
            seen.add(item[0])
            yield item[0], item[1].detach()


def _gathered_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    return iter(model.bridge.export_weights(model.chunks))


def _holds_all(model: Model) -> bool:
    """Whether this rank has every weight, whole; mbridge would ask the other ranks for each."""
    ranks = model.bridge.mpu
    return ranks.tp_size == ranks.pp_size == ranks.ep_size == 1


def _whole_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """As mbridge exports them from one rank, without a collective."""
    bridge = model.bridge
    for chunk in model.chunks:
        part = unwrapped(chunk)
        names = bridge._weight_name_mapping_mcore_local_to_global(part, consider_ep=False)
        for name, parameter in part.named_parameters():
            yield from zip(*bridge._weight_to_hf_format(names[name], parameter), strict=True)


def save_hugging_face(model: Model, source: str, folder: Path, *, write: bool) -> None:
    """Make ``folder`` a Hugging Face checkpoint: safetensors, and the other files of ``source``.

    Every rank takes part, the one with ``write`` writes. The other files are the configuration, the
    tokenizer and whatever small files stand beside them.
    """
    files = HuggingFaceFolder(Path(source), folder) if write else None
    for name, tensor in export_weights(model):
        if files is not None:
            files.add(name, tensor)
    if files is not None:
        files.finish()
