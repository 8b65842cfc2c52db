"""What an earlier version wrote is read as it was meant: one store for each schema version.

``golden/v1/samples.json`` tells what went into the store beside it, independently of Arrow.
"""

import json
import shutil
from pathlib import Path

import pytest

from rollflow.storage.audit import audit_run
from rollflow.storage.checkpoints import newest_valid_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.ledger import read_issue
from rollflow.storage.manifests import (
    batch_folder,
    find_batch,
    manifest_parts,
    read_batch,
    read_manifest,
)
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run, read_run
from rollflow.storage.samples import Sample, Status
from rollflow.storage.schema import SCHEMA, from_table
from rollflow.storage.shards import ShardWriter, read_part
from rollflow.storage.steps import read_steps

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(int(folder.name[1:]) for folder in GOLDEN.iterdir())


@pytest.fixture(params=VERSIONS)
def golden(request, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(GOLDEN / f"v{request.param}", folder)
    rows = json.loads((folder / "samples.json").read_text())
    samples = [Sample(**{**row, "status": Status(row["status"])}) for row in rows]
    store = Store(StoreConfig(url=str(folder)))
    return store, open_run(store, "golden"), samples


def test_there_is_a_store_of_every_schema_version_before_the_current_one():
    current = int(SCHEMA.metadata[b"rollflow.schema"])
    assert list(range(1, current)) == VERSIONS


def test_every_sample_comes_back_as_it_was_written(golden):
    store, run, samples = golden
    batches = [find_batch(store, run, step) for step in (0, 1)]
    batches.append(find_batch(store, run, 2, "heldout"))
    assert [s for ref in batches if ref for s in read_batch(store, ref)] == samples


def test_every_record_is_read_and_the_whole_run_is_sound(golden):
    store, run, _ = golden
    assert read_run(store, "golden").config["rollout"]["batch_size"] == 2
    assert [s.metrics["train/loss"] for s in read_steps(store, run)] == [0.125, 0.125]
    assert len(read_issue(store, run, 1).groups) == 2
    checkpoint, damaged = newest_valid_checkpoint(store, run)
    assert checkpoint is not None
    assert (checkpoint.step, damaged) == (1, [])
    assert audit_run(store, run).findings == []


def test_samples_of_an_older_version_go_on_into_a_new_part(golden):
    store, run, _ = golden
    manifest = read_manifest(store, batch_folder(run, 0))
    [part, *_] = manifest_parts(manifest)
    samples = from_table(read_part(store, batch_folder(run, 0), part))
    other = Store(StoreConfig(url=f"{store.root}-new"))
    new = open_run(store, "golden")
    written = ShardWriter(other, type(new)("golden", other.run_url("golden")), "runs/golden/x")
    again = written.append(samples)
    assert from_table(read_part(other, written.folder, again)) == samples
