"""How losses per token become one number: as a weight per token.

The weights are computed once for a whole mini-batch. After that a loss is a plain sum of
``weight x loss``, so it does not matter how the tokens are cut into micro-batches and ranks.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Reduction = Literal["token", "sequence"]


def token_weights(masks: Sequence[Tensor], reduction: Reduction) -> list[Tensor]:
    """Weight of each token in the loss of a mini-batch, float32, shaped as ``masks``.

    ``masks`` has one bool tensor [t_i] per sample of the *whole* mini-batch, True where a token is
    trained on. ``token``: every trained token counts alike, 1 / (trained tokens of the batch).
    ``sequence``: every sample counts alike and so do its trained tokens,
    1 / (samples with a trained token x trained tokens of the sample). The weights sum to 1; they
    are 0 where the mask is False, hence everywhere when nothing is trained on.
    """
    weights_N = sample_weights([int(mask.sum()) for mask in masks], reduction)
    return [mask.float() * weight for mask, weight in zip(masks, weights_N, strict=True)]


def sample_weights(trained_tokens_N: Sequence[int], reduction: Reduction) -> list[float]:
    """Weight that each *trained token* of a sample has, [N]; see ``token_weights``."""
    match reduction:
        case "token":
            total = sum(trained_tokens_N)
            return [1 / total if tokens else 0.0 for tokens in trained_tokens_N]
        case "sequence":
            samples = sum(tokens > 0 for tokens in trained_tokens_N)
            return [1 / (samples * tokens) if tokens else 0.0 for tokens in trained_tokens_N]
