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


def export_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight; parts of what servers fuse come in order (q, k, v).

    A tensor may be the model's own: copy it to keep it. Weights that two pipeline stages hold, tied
    embeddings, come once.
    """
    weights = iter(model.bridge.export_weights(model.chunks))
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
