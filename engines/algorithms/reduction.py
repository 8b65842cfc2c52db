"""How losses per token become one number: as a weight per token.

The weights are computed once for a whole mini-batch. After that a loss is a plain sum of
``weight x loss``, so it does not matter how the tokens are cut into micro-batches and ranks.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

from torch import Tensor

Reduction = Literal["token", "sequence", "episode", "constant"]


def token_weights(
    masks: Sequence[Tensor],
    reduction: Reduction,
    episodes_N: Sequence[Hashable] | None = None,
    constant_tokens: int = 0,
) -> list[Tensor]:
    """Weight of each token in the loss of a mini-batch, float32, shaped as ``masks``.

    ``masks`` has one bool tensor [t_i] per sample of the *whole* mini-batch, True where a token is
    trained on; elsewhere the weight is 0. See :func:`sample_weights`.
    """
    trained_N = [int(mask.sum()) for mask in masks]
    weights_N = sample_weights(trained_N, reduction, episodes_N, constant_tokens)
    return [mask.float() * weight for mask, weight in zip(masks, weights_N, strict=True)]


def sample_weights(
    trained_tokens_N: Sequence[int],
    reduction: Reduction,
    episodes_N: Sequence[Hashable] | None = None,
    constant_tokens: int = 0,
) -> list[float]:
    """Weight that each *trained token* of a sample has, [N].

    ``token``: every trained token counts alike, 1 / (trained tokens of the batch). ``sequence``:
    every sample counts alike and so do its trained tokens, 1 / (samples with a trained token x
    trained tokens of the sample). ``episode``: the same with the samples of an episode taken as
    one; without ``episodes_N`` each sample is its own. ``constant``: 1 / (samples with a trained
    token x ``constant_tokens``) (Dr.GRPO, arXiv:2503.20783). But for the last the weights sum to 1.

    Raises ValueError for ``constant`` without its divisor.
    """
    samples = sum(tokens > 0 for tokens in trained_tokens_N)
    match reduction:
        case "token":
            share = sum(trained_tokens_N)
            return [1 / share if tokens else 0.0 for tokens in trained_tokens_N]
        case "sequence":
            return [1 / (samples * tokens) if tokens else 0.0 for tokens in trained_tokens_N]
        case "episode":
            return _episode_weights(trained_tokens_N, episodes_N or range(len(trained_tokens_N)))
        case "constant":
            if constant_tokens <= 0:
                raise ValueError(
                    f"constant_tokens is {constant_tokens}; the constant reduction divides by it"
                )
            share = samples * constant_tokens
            return [1 / share if tokens else 0.0 for tokens in trained_tokens_N]


def _episode_weights(
    trained_tokens_N: Sequence[int], episodes_N: Sequence[Hashable]
) -> list[float]:
    tokens_E: dict[Hashable, int] = {}
    for episode, tokens in zip(episodes_N, trained_tokens_N, strict=True):
        tokens_E[episode] = tokens_E.get(episode, 0) + tokens
    episodes = sum(tokens > 0 for tokens in tokens_E.values())
    return [
        1 / (episodes * tokens_E[episode]) if tokens else 0.0
        for episode, tokens in zip(episodes_N, trained_tokens_N, strict=True)
    ]
