"""An audit finds a sound run sound, and names every object that is not as it was written."""

import json
import uuid
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.storage.audit import AuditReport, audit_run
from rollflow.storage.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    newest_valid_checkpoint,
    store_files,
)
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import json_digest, seal, unseal
from rollflow.storage.lease import acquire
from rollflow.storage.ledger import IssuedGroup, issue
from rollflow.storage.leftovers import clear_leftovers
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import create_run
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step

STEPS = 4


def sample(step: int, group: int) -> Sample:
    return Sample(
        run="r1", step=step, group_id=f"{step:06d}/p:{group}", index=0, prompt_id=f"p:{group}",
        source_row=group, episode_id="e", prompt_text="", response_text="", prompt_ids=[1],
        response_ids=[group], loss_mask=[True], rollout_logprobs=[0.0], policy_versions=[step],
        status=Status.COMPLETED, finish_reason="stop", seed=group,
    )  # fmt: skip


def commit(store: Store, run: RunRef, step: int, dataset: str | None = None, /, **changes):
    writer = ShardWriter(store, run, batch_folder(run, step, dataset))
    for group in range(2):
        writer.append([replace(sample(step, group), **changes)])
    return commit_batch(
        store, run, writer.folder, step, writer.parts, groups=2,
        policy_versions=changes.get("policy_versions", [step]), metrics={}, ledger={},
        dataset=dataset,
    )  # fmt: skip


def build(store: Store, tmp_path) -> RunRef:
    """Four steps of two groups, checkpoints after 1 and 3, an evaluation, a renewed lease."""
    (tmp_path / "staged").mkdir(exist_ok=True)
    (tmp_path / "staged/weights").write_bytes(b"w" * 100)
    (tmp_path / "staged/optimizer").write_bytes(b"o" * 100)
    lease = acquire(store, create_run(store, "r1", {"a": 1}, {}, ""), "flow", 600.0)
    lease.renew()
    run = lease.run
    commit(store, run, 0, "heldout")
    for step in range(STEPS):
        groups = [IssuedGroup(f"{step:06d}/p:{g}", f"p:{g}", 1, (g,)) for g in range(2)]
        issue(store, run, step, groups, step)
        commit_step(store, run, step, commit(store, run, step).digest, f"w{step}", {})
        if step % 2:
            names = ["weights", "optimizer"]
            files = store_files(store, checkpoint_folder(run, step), tmp_path / "staged", names)
            commit_checkpoint(store, run, step, f"w{step}", files)
    return run


@pytest.fixture
def sound(store, tmp_path) -> RunRef:
    return build(store, tmp_path)


def named(report: AuditReport) -> set[str]:
    return {finding.name for finding in report.findings}


def edit(store: Store, url: str, **changes: object) -> None:
    """Change a record as somebody would who also mends its checksum."""
    record = json.loads(store.get(url))
    del record["sha256"]
    store.put_atomic(url, seal(unseal(seal(record | changes), url, record["format"])))


def test_a_sound_run_is_found_sound(store, sound):
    report = audit_run(store, sound)
    assert report.ok
    assert (report.findings, report.leftovers) == ([], [])
    assert report.counts == {
        "batches": 4,
        "checkpoints": 2,
        "evaluations": 1,
        "groups": 8,
        "leases": 1,
        "objects": len(store.list(sound.url)),
        "samples": 8,
        "steps": 4,
    }


def test_a_run_that_has_only_begun_is_sound(store):
    run = create_run(store, "r1", {}, {}, "")
    assert audit_run(store, run).ok
    writer = ShardWriter(store, run, batch_folder(run, 0))
    writer.append([sample(0, 0)])
    report = audit_run(store, run)
    assert report.ok
    assert report.counts == {"objects": 2, "unfinished parts": 1}
    commit_batch(
        store, run, writer.folder, 0, writer.parts,
        groups=1, policy_versions=[0], metrics={}, ledger={},
    )  # fmt: skip
    assert audit_run(store, run).counts["batches not consumed yet"] == 1


def test_a_run_without_its_record_is_named(store, sound):
    store.delete(f"{sound.url}/run.json")
    assert named(audit_run(store, sound)) == {f"{sound.url}/run.json"}


DAMAGE = ("missing", "torn", "flipped", "empty", "longer", "replaced")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Every object of a sound run."""
    store = Store(StoreConfig(url=f"memory://{uuid.uuid4().hex}"))
    run = build(store, tmp_path_factory.mktemp("whole"))
    return {url.removeprefix(store.root): store.get(url) for url in store.list(run.url)}


def may_be_absent(path: str) -> bool:
    """What a sound run may lack: it was not written yet, or nothing was ever issued."""
    newest = ("rollouts/step-000003/manifest", "checkpoints/", "evals/", "steps/step-000003")
    return path.endswith(("issued.json", "manifest.json")) and (
        "issued" in path or any(place in path for place in newest)
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_every_object_that_is_damaged_is_named(whole, data):
    path = data.draw(st.sampled_from(sorted(whole)))
    kind = data.draw(st.sampled_from(DAMAGE))
    before = whole[path]
    at = data.draw(st.integers(0, len(before) - 1))
    other = whole[data.draw(st.sampled_from(sorted(set(whole) - {path})))]
    after = {
        "missing": None,
        "torn": before[:at],
        "flipped": before[:at] + bytes([before[at] ^ (1 << at % 8)]) + before[at + 1 :],
        "empty": b"",
        "longer": before + b"\0",
        "replaced": other,
    }[kind]
    if after is not None and (after == before or _same_json(before, after)):
        return
    if after is None and (may_be_absent(path) or "heartbeat" in path):
        return
    store = Store(StoreConfig(url=f"memory://{uuid.uuid4().hex}"))
    for name, content in (whole | {path: after}).items():
        if content is not None:
            store.put_atomic(f"{store.root}{name}", content)
    report = audit_run(store, RunRef("r1", store.run_url("r1")))
    for url in store.list():
        store.delete(url)
    if after is None and "epoch-000001.json" in path:  # the only lease: its heartbeat says so
        return
    if after is None and "steps/step-000003" in path:  # as before it was written, but for:
        path = "/runs/r1/checkpoints/step-000003/manifest.json"
    assert f"{store.root}{path}" in named(report)


def _same_json(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_a_sample_in_two_batches_is_named(store, sound):
    writer = ShardWriter(store, sound, batch_folder(sound, 4))
    writer.append([replace(sample(4, 1), group_id="000002/p:1")])
    commit_batch(
        store, sound, writer.folder, 4, writer.parts,
        groups=1, policy_versions=[4], metrics={}, ledger={},
    )  # fmt: skip
    [finding] = audit_run(store, sound).findings
    assert finding.name == "000002/p:1"
    assert "step-000002" in finding.reason
    assert "step-000004" in finding.reason


def test_a_sample_that_was_never_issued_is_named(store, sound):
    issue(store, sound, 4, [IssuedGroup("000004/p:0", "p:0", 1, (0,))], 4)
    commit(store, sound, 4)
    assert named(audit_run(store, sound)) == {"000004/p:1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "r2"}, "samples of run 'r2'"),
        ({"step": 2}, "samples of step 2"),
        ({"policy_versions": [5]}, "policy version 5 is above step 4"),
        ({"policy_versions": [2]}, "policy version 2 after 3"),
    ],
)
def test_samples_that_contradict_their_batch_are_named(store, sound, changes, words):
    url = f"{commit(store, sound, 4, **changes).url}/manifest.json"
    [finding] = audit_run(store, sound).findings
    assert finding.name == url
    assert words in finding.reason


def test_a_version_that_the_manifest_hides_is_named(store, sound):
    url = f"{batch_folder(sound, 3)}/manifest.json"
    edit(store, url, policy_versions=[2])
    [finding] = audit_run(store, sound).findings
    assert (finding.name, "policy version 3" in finding.reason) == (url, True)


def test_a_step_that_consumed_another_batch_is_named(store, sound):
    url = f"{sound.url}/steps/step-000002.json"
    edit(store, url, batch_digest="0000")
    [finding] = audit_run(store, sound).findings
    assert finding.name == url
    assert finding.reason.startswith("consumes batch 0000; the step's is ")


def test_a_batch_that_two_steps_consumed_is_named(store, sound):
    first = json.loads(store.get(f"{sound.url}/steps/step-000001.json"))
    edit(store, f"{sound.url}/steps/step-000002.json", batch_digest=first["batch_digest"])
    report = audit_run(store, sound)
    assert named(report) == {f"{sound.url}/steps/step-00000{i}.json" for i in (1, 2)}
    assert len(report.findings) == 3


def test_a_checkpoint_of_other_weights_than_its_steps_is_named(store, sound):
    url = f"{sound.url}/checkpoints/step-000001/manifest.json"
    edit(store, url, weights_digest="other")
    [finding] = audit_run(store, sound).findings
    assert finding == replace(finding, name=url, reason="weights other; w1 in the record of step 1")


def test_an_epoch_that_goes_back_is_named(store, sound):
    url = f"{sound.url}/steps/step-000002.json"
    edit(store, f"{sound.url}/steps/step-000001.json", epoch=2)
    first, *_ = audit_run(store, sound).findings
    assert (first.name, first.reason) == (
        url,
        "epoch 1 after 2",
    )


def test_a_config_that_is_not_the_runs_is_named(store, sound):
    url = f"{sound.url}/run.json"
    edit(store, url, config={"a": 2})
    [finding] = audit_run(store, sound).findings
    assert finding.name == url
    edit(store, url, config_digest=json_digest({"a": 2}))
    assert audit_run(store, sound).ok


def test_an_object_that_belongs_to_nothing_is_named(store, sound):
    strays = {
        store.put_atomic(f"{sound.url}/{path}", b"x")
        for path in (
            "rollouts/notes.txt",
            "rollouts/step-000001/part-1.arrow",
            "rollouts/step-000009/weights",
            "checkpoints/step-000001/loose",
            "steps/step-000001.json.bak",
            "lease/lock",
            "evals/heldout/step-000000/extra",
        )
    }
    store.put_atomic(f"{sound.url}/reward.png", b"x")  # somebody else's, and none of ours
    report = audit_run(store, sound)
    assert named(report) == strays
    assert report.leftovers == []


def test_leftovers_are_told_apart_from_findings_and_can_be_cleared(store, sound, tmp_path):
    paths = [
        "checkpoints/step-000001/epoch-0000/weights",
        "checkpoints/step-000007/epoch-0001/weights",
        "evals/heldout/step-000000/part-0000-00000.arrow",
        "rollouts/step-000001/part-0000-00000.arrow",
    ]
    urls = [store.put_atomic(f"{sound.url}/{path}", b"x") for path in paths]
    if local := store.local_path(f"{sound.url}/steps/.step-000004.json.0a.tmp"):
        local.write_bytes(b"half")
        urls.append(str(local))
    keep = ShardWriter(store, sound, batch_folder(sound, 4)).append([sample(4, 0)])
    report = audit_run(store, sound)
    assert report.ok
    assert [leftover.url for leftover in report.leftovers] == sorted(urls)
    unfinished = [leftover for leftover in report.leftovers if not leftover.is_final]
    assert [leftover.url for leftover in unfinished] == [urls[1]]
    assert len(clear_leftovers(store, sound)) == len(urls) - 1
    report = audit_run(store, sound)
    assert (report.findings, report.leftovers) == ([], unfinished)
    assert store.exists(f"{batch_folder(sound, 4)}/{keep.name}")


def test_a_damaged_checkpoint_is_named_and_the_next_older_one_used(store, sound):
    newest, damage = newest_valid_checkpoint(store, sound)
    assert newest is not None
    assert (newest.step, damage) == (3, [])
    url = f"{checkpoint_folder(sound, 3)}/optimizer"
    store.put_atomic(url, b"o" * 99 + b"p")
    older, damage = newest_valid_checkpoint(store, sound)
    assert older is not None
    assert (older.step, [error.name for error in damage]) == (1, [url])
    manifest = f"{sound.url}/checkpoints/step-000001/manifest.json"
    store.put_atomic(manifest, b"{}")
    none, damage = newest_valid_checkpoint(store, sound)
    assert (none, [error.name for error in damage]) == (None, [url, manifest])
