import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.reduction import sample_weights, token_weights

ragged_masks = st.lists(st.lists(st.booleans(), max_size=9), max_size=9)


def token_mean(values, masks):
    kept = [
        v for vs, ms in zip(values, masks, strict=True) for v, m in zip(vs, ms, strict=True) if m
    ]
    return sum(kept) / len(kept) if kept else 0.0


def sequence_mean(values, masks):
    means = [token_mean([vs], [ms]) for vs, ms in zip(values, masks, strict=True) if any(ms)]
    return sum(means) / len(means) if means else 0.0


MEANS = {"token": token_mean, "sequence": sequence_mean}


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@given(masks=ragged_masks)
def test_the_weighted_sum_is_the_mean_that_the_reduction_names(reduction, masks):
    values = [[float(7 * i + j * j) for j in range(len(m))] for i, m in enumerate(masks)]
    weights = token_weights([torch.tensor(m, dtype=torch.bool) for m in masks], reduction)
    total = sum(float((w * torch.tensor(v)).sum()) for w, v in zip(weights, values, strict=True))
    assert total == pytest.approx(MEANS[reduction](values, masks), rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@given(masks=ragged_masks)
def test_weights_sum_to_one_and_are_zero_exactly_where_nothing_is_trained(reduction, masks):
    weights = token_weights([torch.tensor(m, dtype=torch.bool) for m in masks], reduction)
    assert [(w > 0).tolist() for w in weights] == masks
    trained = any(any(m) for m in masks)
    assert sum(float(w.sum()) for w in weights) == pytest.approx(1.0 if trained else 0.0)


def test_a_long_sample_outweighs_a_short_one_by_token_but_not_by_sequence():
    assert sample_weights([1, 3, 0], "token") == [0.25, 0.25, 0.0]
    assert sample_weights([1, 3, 0], "sequence") == [0.5, 1 / 6, 0.0]


def test_siblings_of_an_episode_count_once_and_share_its_tokens():
    assert sample_weights([1, 3, 2, 0], "episode", ["a", "a", "b", "c"]) == [1 / 8, 1 / 8, 1 / 4, 0]
    assert sample_weights([1, 3], "episode") == [0.5, 1 / 6]


def test_a_constant_divisor_does_not_know_how_long_samples_are():
    assert sample_weights([1, 3, 0], "constant", constant_tokens=10) == [1 / 20, 1 / 20, 0.0]
    with pytest.raises(ValueError, match="constant_tokens is 0"):
        sample_weights([1], "constant")
