"""Every trained token is computed exactly once, wherever the batch is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines.algorithms.config import GrpoConfig, SftConfig
from rollflow.engines.megatron.batch import make_micro_batches, plan_micro_batches
from rollflow.engines.megatron.rows import cut_mini_batches, make_rows
from rollflow.storage.samples import Status

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths=LENGTHS, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_a_plan_has_each_row_once_within_the_budget_and_equally_many_micro_batches(
    lengths, ranks, budget
):
    plan = plan_micro_batches(lengths, ranks, budget)
    assert len({len(bins) for bins in plan}) == 1
    bins = [b for one in plan for b in one]
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in bins if b)


@given(lengths=st.lists(st.integers(1, 50), min_size=8, max_size=60))
def test_ranks_carry_alike(lengths):
    loads = [
        sum(lengths[i] for b in bins for i in b) for bins in plan_micro_batches(lengths, 2, 64)
    ]
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("reduction", ["token", "sequence", "episode"])
@pytest.mark.parametrize(("ranks", "budget"), [(1, 10_000), (1, 20), (3, 20), (40, 5)])
def test_the_weights_of_all_micro_batches_and_ranks_sum_to_one(
    make_samples, reduction, ranks, budget
):
    config = GrpoConfig(reduction=reduction)
    rows = make_rows(make_samples(0), config, 0)
    batches = [
        batch
        for rank in range(ranks)
        for batch in make_micro_batches(
            rows, config, rank=rank, ranks=ranks, max_tokens=budget, device="cpu"
        )
    ]
    assert sum(float(b.weights_M.double().sum()) for b in batches) == pytest.approx(1, abs=1e-6)
    trained = sum(int((b.weights_M > 0).sum()) for b in batches)
    assert trained == sum(len(s.response_ids) for s in make_samples(0))


def test_each_trained_place_is_before_its_target_and_masked_tokens_have_none(make_samples):
    [sample] = make_samples(
        0,
        groups=1,
        per_group=1,
        prompt_ids=[1, 2, 3],
        response_ids=[4, 5, 6, 7],
        loss_mask=[True, False, True, True],
        rollout_logprobs=[-1.0, 0.0, -3.0, -4.0],
        policy_versions=[0, 0, 0, 0],
    )
    [row] = make_rows([sample], SftConfig(), 0)
    assert row.tokens_t.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.trained_m.tolist() == [2, 4, 5]
    assert row.targets_m.tolist() == [4, 6, 7]
    assert row.rollout_logprobs_m.tolist() == [-1.0, -3.0, -4.0]


def test_without_a_prompt_the_first_token_has_nothing_to_be_predicted_from(make_samples):
    [sample] = make_samples(
        0,
        groups=1,
        per_group=1,
        prompt_ids=[],
        response_ids=[4, 5],
        loss_mask=[True, True],
        rollout_logprobs=[-1.0, -2.0],
        policy_versions=[0, 0],
    )
    [row] = make_rows([sample], SftConfig(), 0)
    assert row.targets_m.tolist() == [5]


def test_failed_and_unscored_samples_are_left_out_of_a_policy_loss(make_samples):
    good = make_samples(0, groups=1)
    failed = make_samples(0, groups=1, status=Status.FAILED, reward=None)
    unscored = make_samples(0, groups=1, reward=None)
    assert len(make_rows([*good, *failed, *unscored], GrpoConfig(), 0)) == len(good)
    assert len(make_rows([*failed, *unscored], SftConfig(), 0)) == len(unscored)


def test_mini_batches_hold_whole_groups_and_every_row_once(make_samples):
    rows = make_rows(make_samples(0, groups=7), GrpoConfig(), 0)
    parts = cut_mini_batches(rows, 3)
    groups = [{row.group_id for row in part} for part in parts]
    assert [len(g) for g in groups] == [2, 3, 2]
    assert sum(len(part) for part in parts) == len(rows)
    assert not groups[0] & groups[1]
    with pytest.raises(ValueError, match="updates_per_batch is 8 but the batch has 7 groups"):
        cut_mini_batches(rows, 8)


def test_tokens_of_another_version_are_marked_stale(make_samples):
    assert not any(row.stale for row in make_rows(make_samples(3), GrpoConfig(), 3))
    assert all(row.stale for row in make_rows(make_samples(2), GrpoConfig(), 3))


def test_ranks_are_balanced_by_cost_not_by_tokens():
    lengths = [100, *[10] * 10]
    plan = plan_micro_batches(lengths, 2, 1000, cost=lambda n: float(n * n))
    assert [sum(lengths[i] for bin_ in rank for i in bin_) for rank in plan] == [100, 100]
    lengths = [40, 20, 20, 20, 20]
    plan = plan_micro_batches(lengths, 2, 1000, cost=lambda n: float(n * n))
    shares = [sum(lengths[i] ** 2 for bin_ in rank for i in bin_) for rank in plan]
    assert sorted(shares) == [1600, 1600]
    assert plan[0] == [[0]]
