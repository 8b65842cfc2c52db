"""A batch exists once its manifest does, is what was written, and every damage has a name."""

import json
import uuid
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import ManifestError
from rollflow.storage.manifests import (
    batch_folder,
    batch_steps,
    commit_batch,
    find_batch,
    find_strays,
    manifest_parts,
    read_batch,
    read_manifest,
    read_table,
)
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.shards import Part, ShardWriter, find_parts


def commit(store: Store, run: RunRef, writer: ShardWriter, **changes) -> BatchRef:
    given = {"groups": 3, "policy_versions": [3], "metrics": {}, "ledger": {}} | changes
    return commit_batch(store, run, writer.folder, 3, writer.parts, **given)


def test_a_batch_reads_back_ordered_by_group_and_index(store, run, committed):
    ref, samples = committed
    assert find_batch(store, run, 3) == ref
    assert read_batch(store, ref) == sorted(samples, key=lambda s: (s.group_id, s.index))
    assert read_table(store, ref).num_rows == ref.rows == 6
    assert ref.groups == 3
    assert ref.metrics == {"rollout/reward": 0.5}
    assert read_manifest(store, ref.url)["ledger"] == {"completed": ["a", "b", "c"]}
    assert ref.url == f"{run.url}/rollouts/step-000003"
    assert store.children(ref.url) == ["manifest.json", "part-00000.arrow", "part-00001.arrow"]


def test_a_folder_without_its_manifest_does_not_exist(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    part = writer.append([make_sample(0, 0)])
    assert part == Part("part-00000.arrow", 1, part.bytes, part.sha256)
    assert find_batch(store, run, 3) is None
    assert batch_steps(store, run) == [3]


def test_evaluations_are_batches_under_the_name_of_their_dataset(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3, "heldout"))
    writer.append([make_sample(0, 0)])
    ref = commit(store, run, writer, groups=1, dataset="heldout")
    assert ref.url == f"{run.url}/evals/heldout/step-000003"
    assert find_batch(store, run, 3, "heldout") == ref
    assert find_batch(store, run, 3) is None
    assert len(read_batch(store, ref)) == 1


def test_a_batch_may_be_empty(store, run):
    ref = commit(store, run, ShardWriter(store, batch_folder(run, 3)), groups=0)
    assert read_batch(store, ref) == []


def test_committing_the_same_parts_again_gives_the_batch_that_stands(store, run, committed):
    ref, _ = committed
    parts = manifest_parts(read_manifest(store, ref.url))
    again = commit_batch(
        store, run, ref.url, 3, parts, groups=3, policy_versions=[3], metrics={}, ledger={}
    )
    assert again == ref


def test_other_parts_never_replace_a_committed_batch(store, run, committed):
    ref, samples = committed
    parts = manifest_parts(read_manifest(store, ref.url))[:1]
    with pytest.raises(ManifestError, match=f"{ref.digest}, committed before"):
        commit_batch(
            store, run, ref.url, 3, parts, groups=1, policy_versions=[3], metrics={}, ledger={}
        )
    with pytest.raises(ManifestError, match="a committed batch"):
        ShardWriter(store, ref.url)
    assert len(read_batch(store, ref)) == len(samples)


def test_a_new_writer_clears_what_an_interrupted_one_left(store, run, make_sample):
    folder = batch_folder(run, 3)
    old = ShardWriter(store, folder)
    for group in range(3):
        old.append([make_sample(group, 0)])
    new = ShardWriter(store, folder)
    assert store.children(folder) == []
    new.append([make_sample(5, 0)])
    assert [s.source_row for s in read_batch(store, commit(store, run, new, groups=1))] == [5]


def test_a_new_writer_goes_on_after_the_parts_it_keeps(store, run, make_sample):
    folder = batch_folder(run, 3)
    old = ShardWriter(store, folder)
    for group in range(3):
        old.append([make_sample(group, 0)])
    assert find_parts(store, folder) == list(old.parts)
    new = ShardWriter(store, folder, keep=old.parts[:2])
    new.append([make_sample(5, 0)])
    assert [s.source_row for s in read_batch(store, commit(store, run, new))] == [0, 1, 5]


def test_a_part_that_nobody_named_stops_the_commit(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    writer.append([make_sample(0, 0)])
    store.put_atomic(store.join(writer.folder, "part-00009.arrow"), b"")
    with pytest.raises(ManifestError, match="part-00009"):
        commit(store, run, writer, groups=1)


def test_a_part_that_is_not_there_stops_the_commit(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    store.delete(store.join(writer.folder, writer.append([make_sample(0, 0)]).name))
    with pytest.raises(ManifestError, match=r"part-00000.*no such object"):
        commit(store, run, writer, groups=1)
    assert find_batch(store, run, 3) is None


def test_the_wrong_folder_is_refused_with_the_right_one(store, run):
    writer = ShardWriter(store, batch_folder(run, 4))
    with pytest.raises(ValueError, match=r"goes to .*rollouts/step-000003"):
        commit(store, run, writer)


def test_a_sample_that_occurs_twice_is_named(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    writer.append([make_sample(0, 0), make_sample(0, 1)])
    writer.append([make_sample(1, 0), make_sample(0, 1)])
    ref = commit(store, run, writer, groups=2)
    with pytest.raises(ManifestError, match=r"train.jsonl:0#1 once, found 2 times"):
        read_batch(store, ref)


def test_a_number_of_groups_that_is_not_the_datas_is_named(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    writer.append([make_sample(0, 0)])
    with pytest.raises(ManifestError, match="expected 3 groups, found 1 groups"):
        read_batch(store, commit(store, run, writer))


def test_a_late_object_is_found_and_never_read(store, committed):
    ref, samples = committed
    late = store.put_atomic(f"{ref.url}/part-00002.arrow", b"late")
    assert find_strays(store, ref) == [late]
    assert len(read_batch(store, ref)) == len(samples)


def test_a_manifest_of_another_batch_is_refused(store, committed):
    ref, _ = committed
    with pytest.raises(ManifestError, match="expected digest 0000"):
        read_batch(store, replace(ref, digest="0000"))


def test_a_manifest_whose_numbers_were_edited_is_refused(store, committed):
    ref, _ = committed
    url = f"{ref.url}/manifest.json"
    manifest = json.loads(store.get(url))
    manifest["parts"].pop()
    store.put_atomic(url, json.dumps(manifest).encode())
    with pytest.raises(ManifestError, match=r"manifest.json: expected sha256"):
        read_batch(store, ref)


def test_metrics_that_are_not_finite_come_back(store, run, make_sample):
    writer = ShardWriter(store, batch_folder(run, 3))
    writer.append([make_sample(0, 0)])
    commit(store, run, writer, groups=1, metrics={"a": float("nan"), "b": float("-inf")})
    found = find_batch(store, run, 3)
    assert found is not None
    assert str(found.metrics) == "{'a': nan, 'b': -inf}"


DAMAGE = ("missing", "torn", "flipped", "duplicated", "empty", "longer")


def damaged(data: bytes, other: bytes, kind: str, at: int) -> bytes | None:
    """What a faulty disk or a second writer makes of an object; None: it is gone."""
    place = at % len(data)
    flipped = data[:place] + bytes([data[place] ^ (1 << at % 8)]) + data[place + 1 :]
    return {
        "missing": None,
        "torn": data[:place],
        "flipped": flipped,
        "duplicated": other,
        "empty": b"",
        "longer": data + b"\0",
    }[kind]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(DAMAGE), st.integers(0, 1), st.integers(0, 2**20))
def test_a_damaged_part_is_named_and_yields_no_partial_batch(make_batch, kind, which, at):
    store, ref = make_batch()
    names = [f"{ref.url}/part-0000{i}.arrow" for i in range(2)]
    data = damaged(store.get(names[which]), store.get(names[1 - which]), kind, at)
    if data is None:
        store.delete(names[which])
    else:
        store.put_atomic(names[which], data)
    with pytest.raises(ManifestError) as caught:
        read_batch(store, ref)
    assert caught.value.name == names[which]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(["torn", "flipped", "empty"]), st.integers(0, 2**20))
def test_a_damaged_manifest_is_named_or_still_says_the_same(make_batch, kind, at):
    store, ref = make_batch()
    url = f"{ref.url}/manifest.json"
    before = read_manifest(store, ref.url)
    store.put_atomic(url, damaged(store.get(url), b"", kind, at) or b"")
    try:
        after = read_manifest(store, ref.url)
    except ManifestError as error:
        assert error.name == url
    else:
        assert after == before  # only white space was touched


@pytest.fixture(scope="module")
def make_batch():
    """A new two-part batch in memory each time it is called."""
    from rollflow.storage.samples import Sample, Status

    def sample(group: int) -> Sample:
        return Sample(
            run="r1", step=3, group_id=f"g{group}", index=0, prompt_id="p", source_row=0,
            episode_id="e", prompt_text="", response_text="", prompt_ids=[1], response_ids=[group],
            loss_mask=[True], rollout_logprobs=[0.0], policy_versions=[3],
            status=Status.COMPLETED, finish_reason="stop",
        )  # fmt: skip

    def make() -> tuple[Store, BatchRef]:
        store = Store(StoreConfig(url=f"memory://{uuid.uuid4().hex}"))
        run = RunRef("r1", store.run_url("r1"))
        writer = ShardWriter(store, batch_folder(run, 3))
        writer.append([sample(0)])
        writer.append([sample(1)])
        return store, commit(store, run, writer, groups=2)

    return make
