"""Every prompt is issued, completed or consumed; what is durable is never generated again."""

from dataclasses import replace

import pytest

from rollflow.storage.integrity import ManifestError
from rollflow.storage.lease import LeaseLostError, acquire
from rollflow.storage.ledger import (
    IssuedGroup,
    PromptStatus,
    durable_groups,
    issue,
    prompt_states,
    read_issue,
)
from rollflow.storage.manifests import batch_folder, commit_batch, read_batch
from rollflow.storage.samples import Sample
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step

STEP = 3


def plan(groups: int = 3) -> list[IssuedGroup]:
    return [
        IssuedGroup(f"000003/train.jsonl:{g}", f"train.jsonl:{g}", 2, (10 * g, 10 * g + 1))
        for g in range(groups)
    ]


@pytest.fixture
def group_of(make_sample):
    def samples(group: int, **changes) -> list[Sample]:
        return [replace(make_sample(group, i), seed=10 * group + i, **changes) for i in range(2)]

    return samples


@pytest.fixture
def take_over(store, run):
    """The next writer of the run, as often as it is called."""
    leases = []

    def next_writer():
        for lease in leases:
            lease.release()
        leases.append(acquire(store, run, "flow", 60.0))
        return leases[-1].run

    return next_writer


def writer_of(store, run) -> ShardWriter:
    return ShardWriter(store, run, batch_folder(run, STEP))


def test_a_later_epoch_gets_what_was_issued_before(store, take_over):
    first = issue(store, take_over(), STEP, plan(), policy_version=3)
    other = [replace(group, seeds=(7, 8)) for group in plan(5)]
    again = issue(store, take_over(), STEP, other, policy_version=4)
    assert again == first == read_issue(store, first.run, STEP)
    assert (again.epoch, again.policy_version, list(again.groups)) == (1, 3, plan())


def test_a_late_writer_issues_nothing(store, run, take_over):
    late = take_over()
    take_over()
    with pytest.raises(LeaseLostError):
        issue(store, late, STEP, plan(), policy_version=3)
    assert store.list(batch_folder(run, STEP)) == []


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([*plan(), plan()[0]], "issued twice"),
        ([replace(plan()[0], seeds=(1,))], "1 seeds for 2 samples"),
        ([replace(plan()[0], samples=0, seeds=())], "one sample at least"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(store, run, groups, words):
    with pytest.raises(ValueError, match=words):
        issue(store, run, STEP, groups, policy_version=3)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b"11", b"12")]
)
def test_a_damaged_issue_is_named(store, run, damage):
    issue(store, run, STEP, plan(), policy_version=3)
    url = f"{batch_folder(run, STEP)}/issued.json"
    store.put_atomic(url, damage(store.get(url)))
    for look in (
        lambda: issue(store, run, STEP, plan(), 3),
        lambda: durable_groups(store, run, STEP),
    ):
        with pytest.raises(ManifestError) as caught:
            look()
        assert caught.value.name == url


def test_an_issue_that_was_copied_to_another_step_is_named(store, run):
    issue(store, run, STEP, plan(), policy_version=3)
    url = f"{batch_folder(run, STEP)}/issued.json"
    store.put_atomic(url.replace("000003", "000004"), store.get(url))
    with pytest.raises(ManifestError, match=r"step-000004/issued.json.*found the one of step 3"):
        read_issue(store, run, 4)


def test_durable_groups_are_taken_and_the_others_generated(store, take_over, group_of):
    first = take_over()
    issue(store, first, STEP, plan(4), policy_version=3)
    old = writer_of(store, first)
    part = old.append(group_of(2) + group_of(0))
    old.append(group_of(1)[:1])  # not whole
    second = take_over()
    durable = durable_groups(store, second, STEP)
    assert durable.parts[0] == (part, group_of(2) + group_of(0))
    assert durable.samples == group_of(2) + group_of(0)
    assert durable.missing == [plan(4)[1], plan(4)[3]]
    assert durable.skipped == []
    new = writer_of(store, second)
    new.append(durable.samples)
    for group in durable.missing:
        new.append(group_of(plan(4).index(group)))
    ref = commit_batch(
        store, second, new.folder, STEP, new.parts,
        groups=4, policy_versions=[3], metrics={}, ledger={},
    )  # fmt: skip
    assert read_batch(store, ref) == [s for g in range(4) for s in group_of(g)]
    names = [part.name for part in new.parts]
    assert store.children(new.folder) == ["issued.json", "manifest.json", *names]
    with pytest.raises(ManifestError, match="a committed batch"):
        durable_groups(store, second, STEP)


def test_a_group_that_stands_twice_is_taken_from_the_oldest_part(store, take_over, group_of):
    first = take_over()
    issue(store, first, STEP, plan(1), policy_version=3)
    second = take_over()
    writer_of(store, second).append(group_of(0, response_text="second"))
    # A late write of the first epoch: its name sorts before.
    folder = batch_folder(second, STEP)
    late = store.get(f"{folder}/part-0002-00000.arrow")
    store.delete(f"{folder}/part-0002-00000.arrow")
    writer_of(store, second).append(group_of(0, response_text="first"))
    first_data = store.get(f"{folder}/part-0002-00000.arrow")
    store.put_atomic(f"{folder}/part-0001-00000.arrow", first_data)
    store.put_atomic(f"{folder}/part-0002-00000.arrow", late)
    durable = durable_groups(store, second, STEP)
    assert [(p.name, len(s)) for p, s in durable.parts] == [
        ("part-0001-00000.arrow", 2),
        ("part-0002-00000.arrow", 0),
    ]
    assert {s.response_text for s in durable.samples} == {"first"}
    assert durable.missing == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "r2"}, "of run 'r2'"),
        ({"step": 4}, "of step 4"),
        ({"group_id": "000003/train.jsonl:9"}, "train.jsonl:9#0"),
        ({"prompt_id": "train.jsonl:9"}, "train.jsonl:9"),
    ],
)
def test_a_foreign_part_is_named_and_skipped(store, run, group_of, changes, words):
    issue(store, run, STEP, plan(), policy_version=3)
    writer = writer_of(store, run)
    part = writer.append(group_of(1, **changes))
    durable = durable_groups(store, run, STEP)
    [error] = durable.skipped
    assert error.name.endswith(part.name)
    assert words in str(error.found)
    assert (durable.samples, durable.missing) == ([], plan())


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: d[:2000] + b"\0" + d[2001:],
    ],
)
def test_a_torn_part_is_named_and_skipped(store, run, group_of, damage):
    issue(store, run, STEP, plan(2), policy_version=3)
    writer = writer_of(store, run)
    for group in range(2):
        writer.append(group_of(group))
    url = f"{writer.folder}/{writer.parts[0].name}"
    store.put_atomic(url, damage(store.get(url)))
    durable = durable_groups(store, run, STEP)
    assert [error.name for error in durable.skipped] == [url]
    assert durable.samples == group_of(1)
    assert durable.missing == plan(2)[:1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, b: [a],
        lambda a, b: [a, a],
        lambda a, b: [a, replace(b, index=2)],
        lambda a, b: [a, replace(b, seed=5)],
    ],
)
def test_a_group_that_is_not_whole_is_generated_anew(store, run, group_of, spoil):
    issue(store, run, STEP, plan(1), policy_version=3)
    writer_of(store, run).append(spoil(*group_of(0)))
    durable = durable_groups(store, run, STEP)
    assert (durable.samples, durable.missing) == ([], plan(1))


def test_a_group_may_have_more_samples_than_executions(store, run, group_of):
    issue(store, run, STEP, plan(1), policy_version=3)
    first, second = group_of(0)
    samples = [first, replace(first, index=1), replace(second, index=2)]
    writer_of(store, run).append(samples)
    assert durable_groups(store, run, STEP).samples == samples


def test_every_prompt_is_issued_completed_or_consumed(store, run, group_of):
    assert prompt_states(store, run) == []
    issue(store, run, STEP, plan(2), policy_version=3)

    def seen() -> list[tuple[str, str]]:
        return [(s.prompt_id, s.status.value) for s in prompt_states(store, run)]

    assert seen() == [("train.jsonl:0", "issued"), ("train.jsonl:1", "issued")]
    writer = writer_of(store, run)
    writer.append(group_of(1))
    assert seen() == [("train.jsonl:0", "issued"), ("train.jsonl:1", "completed")]
    writer.append(group_of(0))
    ref = commit_batch(
        store, run, writer.folder, STEP, writer.parts,
        groups=2, policy_versions=[3], metrics={}, ledger={},
    )  # fmt: skip
    assert {status for _, status in seen()} == {"completed"}
    for step in range(STEP + 1):
        commit_step(store, run, step, ref.digest, "w", {})
    assert {s.status for s in prompt_states(store, run)} == {PromptStatus.CONSUMED}
