"""Whatever is asked in SQL is answered from what is committed, and compaction changes no answer."""

from dataclasses import replace

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollflow.storage import open_run
from rollflow.storage.audit import audit_run
from rollflow.storage.checkpoints import commit_checkpoint
from rollflow.storage.compaction import compact, compactions
from rollflow.storage.compare import compare_runs
from rollflow.storage.inspect import find_sample, sample_rows
from rollflow.storage.integrity import ManifestError
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.query import query
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import create_run
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step


def write_steps(store, run: RunRef, make_sample, steps=(0, 1, 2), groups=3, **changes) -> None:
    """Steps of ``groups`` groups of two samples, one part a group; reward is index."""
    for step in steps:
        writer = ShardWriter(store, run, batch_folder(run, step))
        for group in range(groups):
            name = f"{step:06d}/train.jsonl:{group}"
            pair = [make_sample(group, index) for index in (0, 1)]
            writer.append(
                [
                    replace(
                        s,
                        run=run.name,
                        step=step,
                        group_id=name,
                        policy_versions=[0] * 3,
                        **changes,
                    )
                    for s in pair
                ]
            )
        ref = commit_batch(
            store, run, writer.folder, step, writer.parts,
            groups=groups, policy_versions=[0], metrics={"rollout/reward": 0.5}, ledger={},
        )  # fmt: skip
        commit_step(store, run, step, ref.digest, f"w{step}", {"train/loss": 0.5 * step})


@pytest.fixture
def told(store, make_sample) -> RunRef:
    """A run of three steps, with a part of a fourth that is still being generated."""
    run = create_run(store, "r1", {"algorithm": {"name": "grpo"}}, {}, "abc")
    write_steps(store, run, make_sample)
    commit_checkpoint(store, run, 2, "w2", [])
    ShardWriter(store, run, batch_folder(run, 3)).append([make_sample(0, 0)])
    return run


MEANS = "SELECT step, avg(reward) AS mean, count(*) AS n FROM samples GROUP BY 1 ORDER BY 1"


def test_a_mean_by_step_is_over_committed_batches_while_the_run_goes_on(store, told, make_sample):
    assert [tuple(row.values()) for row in query(store, told, MEANS).to_pylist()] == [
        (0, 0.5, 6), (1, 0.5, 6), (2, 0.5, 6),
    ]  # fmt: skip
    for part in store.list(batch_folder(told, 3)):
        store.delete(part)
    write_steps(store, told, make_sample, steps=[3])
    assert query(store, told, MEANS).num_rows == 4


def test_every_view_answers(store, told):
    def one(sql):
        return query(store, told, sql).to_pylist()

    assert one("SELECT count(*) AS n FROM samples WHERE response_tokens = 3") == [{"n": 18}]
    assert one("SELECT count(*) AS n FROM evals") == [{"n": 0}]
    assert [row["rows"] for row in one("SELECT * FROM batches")] == [6, 6, 6]
    assert one("SELECT metrics['train/loss'] AS loss FROM steps WHERE step = 1") == [{"loss": 0.5}]
    assert one("SELECT value FROM metrics WHERE name = 'train/loss' AND step = 2") == [{"value": 1}]
    assert one("SELECT step, weights_digest, files FROM checkpoints") == [
        {"step": 2, "weights_digest": "w2", "files": 0}
    ]
    with pytest.raises(ValueError, match=r"(?s)nonsense.*views samples, evals"):
        one("SELECT nonsense FROM samples")


def test_evaluations_are_asked_by_dataset(store, told, make_sample):
    writer = ShardWriter(store, told, batch_folder(told, 3, "it's"))
    writer.append([replace(make_sample(0, 0), run="r1")])
    commit_batch(
        store, told, writer.folder, 3, writer.parts,
        groups=1, policy_versions=[3], metrics={}, ledger={}, dataset="it's",
    )  # fmt: skip
    assert query(store, told, "SELECT dataset, step FROM evals").to_pylist() == [
        {"dataset": "it's", "step": 3}
    ]


def test_compaction_changes_no_answer_and_nothing_of_the_log(store, told, make_sample):
    sql = "SELECT * FROM samples ORDER BY step, sample_id"
    before, objects = query(store, told, sql), store.list(told.url)
    [file] = compact(store, told, before=2)
    assert (file.first, file.last, file.rows) == (0, 1, 12)
    assert query(store, told, sql).to_pylist() == before.to_pylist()
    assert set(objects) < set(store.list(told.url))
    assert [f.digests for f in compact(store, told)] == [{2: file_digest(store, told, 2)}]
    assert compact(store, told) == []
    assert query(store, told, sql).to_pylist() == before.to_pylist()
    assert audit_run(store, told).findings == []


def test_a_compaction_of_an_older_version_is_read(store, told):
    sql = "SELECT * FROM samples ORDER BY step, sample_id"
    before = query(store, told, sql).to_pylist()
    [file] = compact(store, told)
    table = pq.read_table(pa.BufferReader(store.get(file.url)))
    older = pa.BufferOutputStream()
    pq.write_table(table.drop_columns(["routed_experts"]), older)
    store.put_atomic(file.url, older.getvalue().to_pybytes())
    assert query(store, told, sql).to_pylist() == before


def file_digest(store, run: RunRef, step: int) -> str:
    rows = query(store, run, "SELECT digest FROM batches WHERE step = ?", [step])
    return rows.to_pylist()[0]["digest"]


def test_a_damaged_record_of_a_compaction_is_named(store, told):
    [file] = compact(store, told)
    url = file.url.replace(".parquet", ".json")
    store.put_atomic(url, store.get(url).replace(b'"rows": 18', b'"rows": 19'))
    with pytest.raises(ManifestError, match=r"compact/step-000000-000002\.json"):
        compactions(store, told)


def test_one_sample_is_found_by_its_id_and_verified(store, told):
    sample = find_sample(store, told, "000001/train.jsonl:2#1")
    assert (sample.step, sample.source_row, sample.index) == (1, 2, 1)
    for name in ("000001/train.jsonl:9#0", "000003/train.jsonl:0#0"):
        with pytest.raises(ValueError, match="has no sample"):
            find_sample(store, told, name)
    with pytest.raises(ValueError, match="ids look like"):
        find_sample(store, told, "000001")
    url = f"{batch_folder(told, 1)}/part-0000-00002.arrow"
    store.put_atomic(url, store.get(url)[:-1])
    with pytest.raises(ManifestError, match="part-0000-00002"):
        find_sample(store, told, "000001/train.jsonl:2#1")


def test_samples_are_filtered_and_limited_in_order(store, told):
    rows = sample_rows(store, told, "reward >= ? AND prompt_id = ?", [1.0, "train.jsonl:1"], 2)
    found = rows.read_all()
    assert found.column("group_id").to_pylist() == [
        "000000/train.jsonl:1", "000001/train.jsonl:1",
    ]  # fmt: skip


def test_two_runs_are_compared_sample_by_sample(store, told, make_sample):
    other = create_run(store, "r2", {}, {}, "")
    write_steps(store, other, make_sample, steps=[0, 1], reward=1.0, grader="new@2")
    found = compare_runs((store, told), (store, other))
    assert (found.both, found.only_left, found.only_right) == (12, 6, 0)
    assert (found.other_reward, found.other_text) == (6, 0)
    assert (found.mean_left, found.mean_right) == (0.5, 1.0)
    assert {row["sample_id"][-2:] for row in found.rows} == {"#0"}
    assert compare_runs((store, told), (store, other), step=0, rows=1).both == 6


def test_a_run_is_opened_by_its_url_alone(store, told):
    run = open_run(told.url, store.config.options)
    assert [record.ref.step for record in run.steps()] == [0, 1, 2]
    assert run.samples().num_rows == 18
    assert run.samples(1).column("step").unique().to_pylist() == [1]
    assert run.samples([0, 2]).num_rows == 12
    assert list(run.frame(0)["reward"]) == [0, 1] * 3
    assert [c.step for c in run.checkpoints()] == [2]
    assert run.evaluations() == {}
    assert run.metrics().column("train/loss").to_pylist() == [0, 0.5, 1]
    assert run.sql("SELECT count(*) AS n FROM samples WHERE step = ?", 1).to_pylist() == [{"n": 6}]
    assert run.settings["algorithm"] == {"name": "grpo"}
    with pytest.raises(ValueError, match=r"no committed batch of step 3; it has 0-2"):
        run.samples(3)


@pytest.mark.parametrize("url", ["somewhere", "s3://bucket/runs/a/b"])
def test_a_url_that_names_no_run_is_refused(url):
    with pytest.raises(ValueError, match="names no run"):
        open_run(url)


def test_what_was_written_can_be_read_without_rollflow(store, told, tmp_path):
    store.get_file(f"{batch_folder(told, 0)}/part-0000-00000.arrow", tmp_path / "part.arrow")
    import pyarrow as pa

    with pa.memory_map(str(tmp_path / "part.arrow")) as file:
        samples = pa.ipc.open_file(file).read_all()
    answer = duckdb.connect().execute("SELECT avg(reward) FROM samples").fetchall()
    assert answer == [(0.5,)]
    assert samples.num_rows == 2
