"""A batch at a glance."""

from dataclasses import replace

from rollflow.storage.glance import glance
from rollflow.storage.manifests import LeftOut, batch_folder, commit_batch
from rollflow.storage.samples import Status
from rollflow.storage.shards import ShardWriter


def commit(store, run, samples, groups, left_out=None):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    for sample in samples:
        writer.append([sample])
    return commit_batch(
        store, run, batch_folder(run, 3), 3, writer.parts, groups=groups,
        policy_versions=[3], metrics={}, ledger={}, left_out=left_out,
    )  # fmt: skip


def test_best_median_and_worst_are_by_reward_whatever_order_they_were_written_in(
    store, run, make_sample
):
    rewards = [0.5, 2.0, -1.0, 0.25, 1.0]
    samples = [replace(make_sample(0, i), reward=r) for i, r in enumerate(rewards)]
    seen = glance(store, commit(store, run, samples, groups=1))
    assert seen.rewards == sorted(rewards)
    assert seen.worst and seen.median and seen.best
    assert (seen.worst.reward, seen.median.reward, seen.best.reward) == (-1.0, 0.5, 2.0)
    assert seen.best.sample_id == samples[1].sample_id


def test_a_failed_sample_is_counted_and_has_no_reward(store, run, make_sample):
    good = replace(make_sample(0, 0), reward=1.0)
    bad = replace(make_sample(0, 1), reward=None, status=Status.FAILED)
    seen = glance(store, commit(store, run, [good, bad], groups=1))
    assert (seen.rewards, seen.failed) == ([1.0], 1)


def test_groups_that_were_left_out_are_not_shown(store, run, make_sample):
    member = replace(make_sample(0, 0), reward=0.0)
    out = replace(make_sample(1, 0), reward=9.0)
    ref = commit(store, run, [member, out], 1, {out.group_id: LeftOut("surplus", 1)})
    assert glance(store, ref).rewards == [0.0]
