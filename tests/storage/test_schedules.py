"""Whatever write a writer dies before or after, a reader sees the whole batch or none."""

import uuid
from contextlib import suppress
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step, last_step

GROUPS = 4


class Killed(Exception):
    """The writer's process ended."""


@dataclass(frozen=True)
class Death:
    """After so many writes; the last one did or did not reach the store."""

    writes: int
    reached: bool


class MortalStore(Store):
    """A store client whose process dies at a chosen write."""

    def __init__(self, config: StoreConfig, death: Death | None) -> None:
        super().__init__(config)
        self._death, self._writes = death, 0

    def put_atomic(self, path: str, data: bytes) -> str:
        return self._mortal(super().put_atomic, path, data)

    def put_new(self, path: str, data: bytes) -> str:
        return self._mortal(super().put_new, path, data)

    def _mortal(self, put, path: str, data: bytes) -> str:
        death = self._death if self._death and self._death.writes == self._writes else None
        self._writes += 1
        if death and not death.reached:
            raise Killed
        url = put(path, data)
        if death:
            raise Killed
        return url


def sample(group: int, index: int) -> Sample:
    return Sample(
        run="r", step=0, group_id=f"g{group}", index=index, prompt_id=f"p:{group}",
        source_row=group, episode_id="e", prompt_text="", response_text="", prompt_ids=[1],
        response_ids=[group], loss_mask=[True], rollout_logprobs=[0.0], policy_versions=[0],
        status=Status.COMPLETED, finish_reason="stop",
    )  # fmt: skip


EVERYTHING = [sample(group, index) for group in range(GROUPS) for index in range(2)]


def iterate(store: Store, run: RunRef, order: list[int]) -> BatchRef:
    """One step as a flow does it: find the batch or make it, then the step's record."""
    batch = find_batch(store, run, 0)
    if batch is None:
        folder = batch_folder(run, 0)
        writer = ShardWriter(store, run, folder)
        for group in order:
            writer.append([sample(group, 0), sample(group, 1)])
        batch = commit_batch(
            store, run, folder, 0, writer.parts,
            groups=GROUPS, policy_versions=[0], metrics={}, ledger={},
        )  # fmt: skip
    commit_step(store, run, 0, batch.digest, "w1", {})
    return batch


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.builds(Death, st.integers(0, GROUPS + 1), st.booleans()),
            st.permutations(range(GROUPS)),
        ),
        max_size=6,
    )
)
def test_a_reader_sees_the_whole_batch_or_none_and_a_committed_one_never_changes(lives):
    config = StoreConfig(url=f"memory://{uuid.uuid4().hex}")
    reader = Store(config)
    run = RunRef("r", reader.run_url("r"))
    seen: set[str] = set()
    for death, order in [*lives, (None, range(GROUPS))]:
        with suppress(Killed):
            iterate(MortalStore(config, death), run, list(order))
        batch = find_batch(reader, run, 0)
        step = last_step(reader, run)
        if batch is not None:
            seen.add(batch.digest)
            assert read_batch(reader, batch) == EVERYTHING
        if step is not None:
            assert batch is not None
            assert step.batch_digest == batch.digest
        assert len(seen) <= 1
    assert last_step(reader, run) is not None
    for url in reader.list():
        reader.delete(url)
