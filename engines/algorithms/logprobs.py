"""Log-probability and entropy of target tokens, from logits that may be split over ranks.

Softmax in float32 needs several times the memory of bfloat16 logits. So the work is done in chunks
of tokens, and the backward pass makes the softmax again from the kept log-normaliser. That is kept
as its two parts, the highest logit and the rest: their sum would be rounded in proportion to the
logits, and every probability with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .metrics import AllReduce

_CHUNK_ELEMENTS = 2**25


def target_logprobs(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    all_reduce: AllReduce | None = None,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the targets, entropies of the distributions), both float32 [T], nats.

    The distribution is softmax(logits / temperature) over the whole vocabulary. Where the
    vocabulary is split evenly over ranks, ``logits_TV`` holds the columns from ``vocab_start`` on
    and ``all_reduce`` reduces a tensor in place over those ranks. Columns from ``vocab_size`` on
    (counted in the whole vocabulary) are padding and take no part. About ``chunk_elements`` logits
    are held in float32 at a time; a GPU that has the whole vocabulary holds none. Both results are
    differentiable in the logits, exactly. A target outside the vocabulary has log-probability NaN.

    Raises ValueError where shapes do not fit or the temperature is not positive.
    """
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits_TV has shape {tuple(logits_TV.shape)}, targets_T {tuple(targets_T.shape)}; "
            "give [T, V] and [T]"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    width = logits_TV.shape[1]
    columns = width if vocab_size is None else min(width, max(0, vocab_size - vocab_start))
    split = _Split(columns, temperature, all_reduce, max(1, chunk_elements // max(1, width)))
    apply = cast(
        Callable[..., tuple[Tensor, Tensor]],
        _TargetLogprobs.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    return apply(logits_TV, targets_T - vocab_start, split)


class _Split(NamedTuple):
    columns: int
    """Columns of this rank that are no padding."""
    temperature: float
    all_reduce: AllReduce | None
    chunk_tokens: int

    def scaled(self, logits_cV: Tensor) -> Tensor:
        """A new float32 tensor: logits / temperature, -inf where they are padding."""
        scaled_cV = logits_cV.float() / self.temperature
        if self.columns < scaled_cV.shape[1]:
            scaled_cV[:, self.columns :] = -torch.inf
        return scaled_cV

    def owned(self, targets_c: Tensor) -> tuple[Tensor, Tensor]:
        """(whether this rank holds the target, its column or 0), both [c]."""
        here_c = (targets_c >= 0) & (targets_c < self.columns)
        return here_c, targets_c.masked_fill(~here_c, 0)


class _TargetLogprobs(torch.autograd.Function):
    """With z = logits / temperature, L = logsumexp(z), p = exp(z - L) and H the entropy:
    d logprob / dz_j = [j is the target] - p_j and dH / dz_j = -p_j (z_j - L + H)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, split: _Split
    ) -> tuple[Tensor, Tensor]:
        logprobs_T, entropy_T, highest_T, log_total_T = _forward(logits_TV, targets_T, split)
        ctx.save_for_backward(logits_TV, targets_T, highest_T, log_total_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.split = split
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None]:
        logits_TV, targets_T, highest_T, log_total_T, entropy_T = cast(
            tuple[Tensor, Tensor, Tensor, Tensor, Tensor], ctx.saved_tensors
        )
        if grad_logprobs_T is None:
            grad_logprobs_T = torch.zeros_like(entropy_T)
        stats = highest_T, log_total_T, entropy_T
        gradient_TV = _backward(
            logits_TV, targets_T, stats, grad_logprobs_T, grad_entropy_T, cast(_Split, ctx.split)
        )
        return gradient_TV, None, None


def _forward(
    logits_TV: Tensor, targets_T: Tensor, split: _Split
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities, entropies, highest logits, log-normalisers less these), each [T]."""
    if (kernels := _kernels(logits_TV, split)) is not None:
        return kernels.forward(logits_TV, targets_T, split.columns, split.temperature)
    tokens = logits_TV.shape[0]
    results_4T = logits_TV.new_empty((4, tokens), dtype=torch.float32)
    for start in range(0, tokens, split.chunk_tokens):
        rows = slice(start, start + split.chunk_tokens)
        results_4T[:, rows] = _forward_chunk(logits_TV[rows], targets_T[rows], split)
    logprobs_T, entropy_T, highest_T, log_total_T = (row_T.clone() for row_T in results_4T)
    return logprobs_T, entropy_T, highest_T, log_total_T


def _backward(
    logits_TV: Tensor,
    targets_T: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    on_logprobs_T: Tensor,
    on_entropy_T: Tensor | None,
    split: _Split,
) -> Tensor:
    """Gradient of the logits; ``stats`` are highest logit, log-normaliser less it, and entropy."""
    if (kernels := _kernels(logits_TV, split)) is not None:
        return kernels.backward(
            logits_TV,
            targets_T,
            stats,
            on_logprobs_T,
            on_entropy_T,
            split.columns,
            split.temperature,
        )
    if on_entropy_T is None:
        on_entropy_T = torch.zeros_like(on_logprobs_T)
    highest_T, log_total_T, entropy_T = stats
    gradient_TV = torch.empty_like(logits_TV)
    for start in range(0, logits_TV.shape[0], split.chunk_tokens):
        rows = slice(start, start + split.chunk_tokens)
        gradient_TV[rows] = _backward_chunk(
            logits_TV[rows],
            targets_T[rows],
            highest_T[rows],
            log_total_T[rows],
            entropy_T[rows],
            on_logprobs_T[rows],
            on_entropy_T[rows],
            split,
        )
    return gradient_TV


def _kernels(logits_TV: Tensor, split: _Split) -> Any:
    """The same as one pass over the logits each way, for whole rows on a GPU."""
    if not logits_TV.is_cuda or split.all_reduce is not None:
        return None
    from rollflow.engines.gpu import logprob_kernels

    return logprob_kernels


def _backward_chunk(
    logits_cV: Tensor,
    targets_c: Tensor,
    highest_c: Tensor,
    log_total_c: Tensor,
    entropy_c: Tensor,
    on_logprobs_c: Tensor,
    on_entropy_c: Tensor,
    split: _Split,
) -> Tensor:
    """Gradient of the logits, in their type."""
    here_c, column_c = split.owned(targets_c)
    log_p_cV = split.scaled(logits_cV).sub_(highest_c[:, None])
    log_p_cV.sub_(log_total_c[:, None])
    p_cV = log_p_cV.exp()
    log_p_cV.masked_fill_(p_cV == 0, 0.0).add_(entropy_c[:, None])
    log_p_cV.mul_(on_entropy_c[:, None]).add_(on_logprobs_c[:, None])
    gradient_cV = p_cV.mul_(log_p_cV).neg_()
    gradient_cV.scatter_add_(1, column_c[:, None], (on_logprobs_c * here_c)[:, None])
    return (gradient_cV / split.temperature).to(logits_cV.dtype)


def _forward_chunk(logits_cV: Tensor, targets_c: Tensor, split: _Split) -> Tensor:
    """[log-probability, entropy, highest logit, log-normaliser less it] of each token, [4, c]."""
    scaled_cV = split.scaled(logits_cV)
    highest_c = scaled_cV.amax(dim=1)
    if split.all_reduce:
        split.all_reduce(highest_c, "max")
    shifted_cV = scaled_cV.sub_(highest_c[:, None])
    here_c, column_c = split.owned(targets_c)
    target_c = shifted_cV.gather(1, column_c[:, None])[:, 0].masked_fill(~here_c, 0.0)
    powers_cV = shifted_cV.exp()
    shifted_cV.masked_fill_(powers_cV == 0, 0.0)
    sums_4c = torch.stack(
        [powers_cV.sum(dim=1), (powers_cV * shifted_cV).sum(dim=1), target_c, here_c.float()]
    )
    if split.all_reduce:
        split.all_reduce(sums_4c, "sum")
    total_c, weighted_c, target_c, owners_c = sums_4c.unbind()
    log_total_c = total_c.log()
    logprob_c = (target_c - log_total_c).masked_fill(owners_c == 0, torch.nan)
    return torch.stack([logprob_c, log_total_c - weighted_c / total_c, highest_c, log_total_c])
