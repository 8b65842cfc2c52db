"""What is inside a pipeline stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import linear


def unwrapped(chunk: Any) -> Any:
    """The GPT model inside DistributedDataParallel and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@contextmanager
def without_output_layer(chunk: Any) -> Iterator[None]:
    """Within it the last stage gives hidden states ``[T, 1, hidden]``, as the output layer gets them."""
    gpt = unwrapped(chunk)
    before, gpt.post_process = gpt.post_process, False
    try:
        yield
    finally:
        gpt.post_process = before


def output_layer(chunk: Any, hidden_HD: Tensor) -> Tensor:
    """Logits ``[H, vocabulary]`` of some hidden states, in their own type; no tensor parallelism."""
    gpt = unwrapped(chunk)
    shared = gpt.share_embeddings_and_output_weights
    weight = gpt.shared_embedding_or_output_weight() if shared else gpt.output_layer.weight
    return linear(hidden_HD, weight)
