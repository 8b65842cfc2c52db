"""Sums over the samples of a packed row of tokens.

``segments_T`` (long, [T]) has the number of the sample that each token belongs to. A sample's tokens
stand together and in order; tokens that are not trained on have been left out before.
"""

from torch import Tensor


def segment_sum(values_T: Tensor, segments_T: Tensor) -> Tensor:
    """The sum over each token's sample, at each of its tokens, [T]; differentiable."""
    count = int(segments_T.max()) + 1 if len(segments_T) else 0
    sums_S = values_T.new_zeros(count).index_add(0, segments_T, values_T)
    return sums_S[segments_T]


def segment_mean(values_T: Tensor, segments_T: Tensor) -> Tensor:
    """The mean over each token's sample, at each of its tokens, [T]; differentiable."""
    tokens_T = segment_sum(values_T.detach().new_ones(len(values_T)), segments_T)
    return segment_sum(values_T, segments_T) / tokens_T


def is_last(segments_T: Tensor) -> Tensor:
    """True at the last token of each sample, bool [T]."""
    last_T = segments_T.new_ones(len(segments_T)).bool()
    last_T[:-1] = segments_T[1:] != segments_T[:-1]
    return last_T


def following(values_T: Tensor, segments_T: Tensor) -> Tensor:
    """The value at the sample's next token, 0 at its last, [T]."""
    next_T = values_T.roll(-1)
    return next_T.masked_fill(is_last(segments_T), 0.0)


def discounted_sum(values_T: Tensor, segments_T: Tensor, discount: float) -> Tensor:
    """Sum of discount^(s - t) x value_s over the sample's tokens s from t on, at each t, [T].

    Done by doubling: each round adds the sums that begin 1, 2, 4... tokens later, so that it takes
    as many rounds as the number of tokens has digits.
    """
    sums_T, span, factor = values_T, 1, discount
    while span < len(values_T) and factor:
        same = segments_T[span:] == segments_T[:-span]
        later = sums_T[span:] * same
        if not bool(same.any()):
            break
        sums_T = sums_T.clone()
        sums_T[:-span] += factor * later
        span, factor = 2 * span, factor * factor
    return sums_T
