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
from rollflow.storage.schema import from_table
from rollflow.storage.shards import Part, ShardWriter, part_names, read_loose_part, read_part


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
    assert store.children(ref.url) == [
        "manifest.json",
        "part-0000-00000.arrow",
        "part-0000-00001.arrow",
    ]


def test_a_folder_without_its_manifest_does_not_exist(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    part = writer.append([make_sample(0, 0)])
    assert part == Part("part-0000-00000.arrow", 1, part.bytes, part.sha256)
    assert find_batch(store, run, 3) is None
    assert batch_steps(store, run) == [3]


def test_evaluations_are_batches_under_the_name_of_their_dataset(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3, "heldout"))
    writer.append([make_sample(0, 0)])
    ref = commit(store, run, writer, groups=1, dataset="heldout")
    assert ref.url == f"{run.url}/evals/heldout/step-000003"
    assert find_batch(store, run, 3, "heldout") == ref
    assert find_batch(store, run, 3) is None
    assert len(read_batch(store, ref)) == 1


def test_a_batch_may_be_empty(store, run):
    ref = commit(store, run, ShardWriter(store, run, batch_folder(run, 3)), groups=0)
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
        ShardWriter(store, run, ref.url)
    assert len(read_batch(store, ref)) == len(samples)


def test_a_new_writer_lets_stand_what_an_interrupted_one_left_and_the_commit_clears_it(
    store, run, make_sample
):
    folder = batch_folder(run, 3)
    old = ShardWriter(store, run, folder)
    for group in range(3):
        old.append([make_sample(group, 0)])
    new = ShardWriter(store, run, folder)
    assert store.children(folder) == [part.name for part in old.parts]
    assert new.append([make_sample(5, 0)]).name == "part-0000-00003.arrow"
    ref = commit(store, run, new, groups=1)
    assert [s.source_row for s in read_batch(store, ref)] == [5]
    assert store.children(folder) == ["manifest.json", "part-0000-00003.arrow"]


def test_two_writers_of_one_epoch_never_replace_a_part(store, run, make_sample):
    one, two = (ShardWriter(store, run, batch_folder(run, 3)) for _ in range(2))
    part = one.append([make_sample(0, 0)])
    with pytest.raises(ManifestError, match=r"part-0000-00000.*another writer 0000"):
        two.append([make_sample(1, 0)])
    assert read_part(store, one.folder, part).column("source_row").to_pylist() == [0]
    assert two.append([make_sample(0, 0)]) == part  # only the answer to the put got lost


def test_a_part_that_no_manifest_names_is_verified_by_its_own_seal(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    zeros = replace(make_sample(0, 0), response_text="0" * 64 + "1", label="0" * 64)
    parts = [writer.append([make_sample(i, 0), zeros]) for i in range(2)]
    assert part_names(store, writer.folder) == [part.name for part in parts]
    for part in parts:
        found, table = read_loose_part(store, writer.folder, part.name)
        assert found == part
        assert table == read_part(store, writer.folder, part)
        assert from_table(table)[1] == zeros


def test_a_part_of_a_later_epoch_stops_the_commit(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    writer.append([make_sample(0, 0)])
    store.put_atomic(store.join(writer.folder, "part-0001-00009.arrow"), b"")
    with pytest.raises(ManifestError, match=r"part-0001-00009.*up to epoch 0"):
        commit(store, run, writer, groups=1)


def test_a_part_that_is_not_there_stops_the_commit(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    store.delete(store.join(writer.folder, writer.append([make_sample(0, 0)]).name))
    with pytest.raises(ManifestError, match=r"part-0000-00000.*no such object"):
        commit(store, run, writer, groups=1)
    assert find_batch(store, run, 3) is None


def test_the_wrong_folder_is_refused_with_the_right_one(store, run):
    writer = ShardWriter(store, run, batch_folder(run, 4))
    with pytest.raises(ValueError, match=r"goes to .*rollouts/step-000003"):
        commit(store, run, writer)


def test_a_sample_that_occurs_twice_is_named(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    writer.append([make_sample(0, 0), make_sample(0, 1)])
    writer.append([make_sample(1, 0), make_sample(0, 1)])
    ref = commit(store, run, writer, groups=2)
    with pytest.raises(ManifestError, match=r"train.jsonl:0#1 once, found 2 times"):
        read_batch(store, ref)


def test_a_number_of_groups_that_is_not_the_datas_is_named(store, run, make_sample):
    writer = ShardWriter(store, run, batch_folder(run, 3))
    writer.append([make_sample(0, 0)])
    with pytest.raises(ManifestError, match="expected 3 groups, found 1 groups"):
        read_batch(store, commit(store, run, writer))


def test_a_late_object_is_found_and_never_read(store, committed):
    ref, samples = committed
    late = store.put_atomic(f"{ref.url}/part-0000-00002.arrow", b"late")
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
    writer = ShardWriter(store, run, batch_folder(run, 3))
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
    names = [f"{ref.url}/part-0000-0000{i}.arrow" for i in range(2)]
    data = damaged(store.get(names[which]), store.get(names[1 - which]), kind, at)
    if data is None:
        store.delete(names[which])
    else:
        store.put_atomic(names[which], data)
    with pytest.raises(ManifestError) as caught:
        read_batch(store, ref)
    assert caught.value.name == names[which]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["torn", "flipped", "empty", "longer"]), st.integers(0, 2**20))
def test_a_damaged_part_without_a_manifest_is_named(make_batch, kind, at):
    store, ref = make_batch()
    url = f"{ref.url}/part-0000-00001.arrow"
    store.put_atomic(url, damaged(store.get(url), b"", kind, at) or b"")
    with pytest.raises(ManifestError) as caught:
        read_loose_part(store, ref.url, "part-0000-00001.arrow")
    assert caught.value.name == url


def test_a_whole_batch_that_was_copied_to_another_step_is_named(store, run, committed):
    ref, _ = committed
    for url in store.list(ref.url):
        store.put_atomic(url.replace("step-000003", "step-000004"), store.get(url))
    with pytest.raises(ManifestError, match=r"step-000004/manifest.json.*rollouts/step-000003"):
        find_batch(store, run, 4)


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
        writer = ShardWriter(store, run, batch_folder(run, 3))
        writer.append([sample(0)])
        writer.append([sample(1)])
        return store, commit(store, run, writer, groups=2)

    return make
