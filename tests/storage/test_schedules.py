"""Two writers whose operations interleave in any order and who die at any of them.

Each writer takes the lease and makes one step as a flow does. Between any two of its operations on
the store the other may run, or it may die, its last operation done or not. The first one's process
counts as gone, so that the second takes over at once while the first is still at work.
"""

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.storage.audit import audit_run
from rollflow.storage.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    newest_valid_checkpoint,
    prepare_checkpoint,
    store_files,
)
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import ManifestError
from rollflow.storage.lease import LeaseHeldError, LeaseLostError, acquire
from rollflow.storage.ledger import IssuedGroup, durable_groups, issue
from rollflow.storage.leftovers import clear_leftovers
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.processes import Process, this_process
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.runs import create_run
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step, last_step

GROUPS = 3
PLAN = [IssuedGroup(f"g{g}", f"p:{g}", 2, (2 * g, 2 * g + 1)) for g in range(GROUPS)]
GONE = replace(this_process(), started=this_process().started + 1)
REFUSED = (LeaseLostError, LeaseHeldError, ManifestError)


class Killed(BaseException):
    """The writer's process ended."""


@dataclass
class Writer:
    """A writer in a thread of its own that takes one operation a turn."""

    name: str
    config: StoreConfig
    work: Callable[[Store], None]
    operations: list[str] = field(default_factory=list)
    outcome: BaseException | None = None
    dies: str = ""
    """``before`` or ``after`` its next operation."""

    def __post_init__(self) -> None:
        self.ended = False
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        self._done.acquire()

    def step(self, dies: str = "") -> None:
        """Let it do its next operation, and run up to the one after that."""
        if not self.ended:
            self.dies = dies
            self._turn.release()
            self._done.acquire()

    def finish(self) -> None:
        """Let it do all that is left."""
        while not self.ended:
            self.step()
        self._thread.join()

    def gate(self, operation: str, call: Callable[[], object]) -> object:
        """Do one operation when it is this writer's turn."""
        self._done.release()
        self._turn.acquire()
        self.operations.append(operation)
        if self.dies == "before":
            raise Killed
        result = call()
        if self.dies == "after":
            raise Killed
        return result

    def _live(self) -> None:
        try:
            self.work(GatedStore(self.config, self))
        except (*REFUSED, Killed) as error:
            self.outcome = error
        finally:
            self.ended = True
            self._done.release()


class GatedStore(Store):
    """A store client that asks its writer before each operation."""

    def __init__(self, config: StoreConfig, writer: Writer) -> None:
        super().__init__(config)
        self._writer = writer

    def _call(self, verb, path, call):
        return self._writer.gate(
            f"{verb} {path}", lambda: super(GatedStore, self)._call(verb, path, call)
        )


def sample(writer: str, group: int, index: int) -> Sample:
    return Sample(
        run="r", step=0, group_id=f"g{group}", index=index, prompt_id=f"p:{group}",
        source_row=group, episode_id="e", prompt_text="", response_text=writer, prompt_ids=[1],
        response_ids=[group], loss_mask=[True], rollout_logprobs=[0.0], policy_versions=[0],
        status=Status.COMPLETED, finish_reason="stop", seed=2 * group + index,
    )  # fmt: skip


def one_step(store: Store, name: str, process: Process, staged) -> None:
    """What a flow does: take the lease, find the batch or make it, the step's record, a checkpoint."""
    run = acquire(store, RunRef("r", store.run_url("r")), name, 600.0, process).run
    clear_leftovers(store, run)
    batch = find_batch(store, run, 0) or make_batch(store, run, name)
    commit_step(store, run, 0, batch.digest, "w1", {})
    if prepare_checkpoint(store, run, 0) is None:
        files = store_files(store, checkpoint_folder(run, 0), staged / name, ["weights"])
        commit_checkpoint(store, run, 0, "w1", files)


def make_batch(store: Store, run: RunRef, name: str) -> BatchRef:
    plan = issue(store, run, 0, PLAN, 0)
    durable = durable_groups(store, run, 0)
    writer = ShardWriter(store, run, batch_folder(run, 0))
    if durable.samples:
        writer.append(durable.samples)
    for group in durable.missing:
        number = plan.groups.index(group)
        writer.append([sample(name, number, i) for i in range(2)])
    return commit_batch(
        store, run, writer.folder, 0, writer.parts,
        groups=GROUPS, policy_versions=[0], metrics={}, ledger={},
    )  # fmt: skip


class Reader:
    """What anybody sees at any moment: the same whole batch from the first time on, or none."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.run = RunRef("r", store.run_url("r"))
        self.batch: BatchRef | None = None
        self.samples: list[Sample] = []

    def look(self) -> None:
        batch = find_batch(self.store, self.run, 0)
        if self.batch is None and batch is not None:
            self.batch, self.samples = batch, read_batch(self.store, batch)
            ids = [s.sample_id for s in self.samples]
            assert ids == [f"g{g}#{i}" for g in range(GROUPS) for i in range(2)]
        elif self.batch is not None:
            assert batch == self.batch
            assert read_batch(self.store, self.batch) == self.samples
        if last_step(self.store, self.run):
            assert self.batch is not None
        checkpoint, damage = newest_valid_checkpoint(self.store, self.run)
        assert damage == []
        if checkpoint:
            assert last_step(self.store, self.run) is not None


@pytest.fixture(scope="module", params=["memory", "file"])
def place(request, tmp_path_factory):
    """A URL that nothing was written to yet, as often as it is called."""

    def new() -> str:
        if request.param == "file":
            return str(tmp_path_factory.mktemp("store"))
        return f"memory://{uuid.uuid4().hex}"

    return new


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Checkpoint files that differ from writer to writer, as those of torch_dist may."""
    folder = tmp_path_factory.mktemp("staged")
    for name in ("first", "second", "third"):
        (folder / name).mkdir()
        (folder / name / "weights").write_bytes(name.encode() * 100)
    return folder


SCHEDULES = st.lists(
    st.tuples(st.booleans(), st.integers(1, 25)), max_size=12
)  # who runs next, and for how many operations
DEATHS = st.dictionaries(
    st.booleans(), st.tuples(st.integers(0, 75), st.sampled_from(["before", "after"]))
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SCHEDULES, DEATHS)
def test_whatever_two_writers_do_one_whole_batch_wins(place, staged, schedule, deaths):
    config = StoreConfig(url=place())
    store = Store(config)
    create_run(store, "r", {}, {}, "")
    writers = [
        Writer("first", config, lambda s: one_step(s, "first", GONE, staged)),
        Writer("second", config, lambda s: one_step(s, "second", GONE, staged)),
    ]
    reader = Reader(store)
    for second, turns in [*schedule, (False, 999), (True, 999)]:
        writer = writers[second]
        for _ in range(turns):
            if writer.ended:
                break
            at, how = deaths.get(second, (-1, ""))
            writer.step(how if at == len(writer.operations) else "")
            if writer.operations and writer.operations[-1].startswith(
                ("write", "create", "delete")
            ):
                reader.look()
    for writer in writers:
        writer.finish()
        if isinstance(writer.outcome, REFUSED):
            assert (
                "second" in f"{writer.outcome}"
                or "first" in f"{writer.outcome}"
                or ("manifest.json" in f"{writer.outcome}")
            )
    heir = Writer("third", config, lambda s: one_step(s, "third", this_process(), staged))
    heir.finish()
    assert heir.outcome is None
    reader.look()
    assert reader.batch is not None
    clear_leftovers(store, acquire_after(store, reader.run))
    report = audit_run(store, reader.run)
    assert (report.findings, report.leftovers) == ([], [])
    assert report.counts["checkpoints"] == report.counts["steps"] == report.counts["batches"] == 1
    for url in store.list():
        store.delete(url)


def acquire_after(store: Store, run: RunRef) -> RunRef:
    """The run under the epoch of the heir, who is this process."""
    with pytest.raises(LeaseHeldError) as caught:
        acquire(store, run, "fourth", 600.0)
    return replace(run, epoch=caught.value.claim.epoch)
