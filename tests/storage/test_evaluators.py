"""Evaluations beside a training: no lease, and of two of one version the first stands."""

import pytest

from rollflow.storage.audit import audit_run
from rollflow.storage.integrity import ManifestError
from rollflow.storage.lease import LeaseLostError, acquire
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch, read_batch
from rollflow.storage.refs import evaluator
from rollflow.storage.shards import ShardWriter, part_names
from rollflow.storage.steps import commit_step


def written(store, run, samples, dataset="heldout", step=3):
    writer = ShardWriter(store, run, batch_folder(run, step, dataset))
    writer.append(samples)
    return writer


def committed(store, run, writer, dataset="heldout", step=3):
    folder = batch_folder(run, step, dataset)
    return commit_batch(
        store, run, folder, step, writer.parts,
        groups=1, policy_versions=[3], metrics={}, ledger={}, dataset=dataset,
    )  # fmt: skip


@pytest.fixture
def leased(store, run):
    return acquire(store, run, "training", 60.0).run


def test_an_evaluation_is_committed_while_a_training_holds_the_run(store, run, leased, make_sample):
    beside = evaluator(run)
    ref = committed(store, beside, written(store, beside, [make_sample(0, 0)]))
    assert find_batch(store, run, 3, "heldout") == ref
    assert len(read_batch(store, ref)) == 1


def test_whoever_holds_no_lease_writes_no_rollouts_and_no_steps(store, run, leased, make_sample):
    beside = evaluator(run)
    with pytest.raises(LeaseLostError, match="may only evaluate"):
        ShardWriter(store, beside, batch_folder(beside, 3))
    with pytest.raises(LeaseLostError, match="may only evaluate"):
        commit_step(store, beside, 0, "batch", "weights", {})


@pytest.mark.parametrize("training_first", [True, False])
def test_of_two_evaluations_of_one_version_the_first_stands_and_both_are_given_it(
    store, run, leased, make_sample, training_first
):
    beside = evaluator(run)
    writers = {
        who.writer: (who, written(store, who, [make_sample(0, 0)])) for who in (beside, leased)
    }
    order = [leased, beside] if training_first else [beside, leased]
    first, second = [committed(store, *writers[who.writer]) for who in order]
    assert first.digest == second.digest
    standing = find_batch(store, run, 3, "heldout")
    assert standing is not None
    assert standing.digest == first.digest
    assert len(part_names(store, first.url)) == 1  # the other's part is cleared away


def test_two_evaluators_do_not_touch_one_anothers_parts(store, run, leased, make_sample):
    one, other = evaluator(run), evaluator(run)
    mine, theirs = (written(store, who, [make_sample(0, 0)]) for who in (one, other))
    assert mine.parts[0].name != theirs.parts[0].name
    assert committed(store, one, mine).digest == committed(store, other, theirs).digest


def test_an_evaluation_that_stands_is_not_begun_again(store, run, leased, make_sample):
    beside = evaluator(run)
    committed(store, beside, written(store, beside, [make_sample(0, 0)]))
    with pytest.raises(ManifestError, match="a committed batch"):
        ShardWriter(store, evaluator(run), batch_folder(run, 3, "heldout"))


def test_what_an_evaluator_left_unfinished_is_no_finding_of_an_audit(
    store, run, leased, make_sample
):
    written(store, evaluator(run), [make_sample(0, 0)])
    report = audit_run(store, run)
    assert not [finding for finding in report.findings if "/evals/" in finding.name]
    assert report.counts["unfinished parts"] == 1
