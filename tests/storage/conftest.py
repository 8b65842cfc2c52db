"""Real stores, on disk and in memory, and samples to put into them."""

import uuid
from collections.abc import Callable

import pytest

from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path) -> Store:
    place = str(tmp_path / "store") if request.param == "file" else f"memory://{uuid.uuid4().hex}"
    return Store(StoreConfig(url=place))


@pytest.fixture
def run(store) -> RunRef:
    return RunRef("r1", store.run_url("r1"))


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    return build_sample


@pytest.fixture
def committed(store, run) -> tuple[BatchRef, list[Sample]]:
    """A batch of three groups of two samples, in two parts, groups finished out of order."""
    samples = [build_sample(group, index) for group in (2, 0, 1) for index in (0, 1)]
    writer = ShardWriter(store, run, batch_folder(run, 3))
    writer.append(samples[:2])
    writer.append(samples[2:])
    ref = commit_batch(
        store,
        run,
        writer.folder,
        3,
        writer.parts,
        groups=3,
        policy_versions=[3],
        metrics={"rollout/reward": 0.5},
        ledger={"completed": ["a", "b", "c"]},
    )
    return ref, samples


def build_sample(group: int, index: int, tokens: int = 3) -> Sample:
    return Sample(
        run="r1",
        step=3,
        group_id=f"000003/train.jsonl:{group}",
        index=index,
        prompt_id=f"train.jsonl:{group}",
        source_row=group,
        episode_id=f"e{group}.{index}",
        prompt_text="2+2=",
        response_text="4\n",
        prompt_ids=[5, 6, 5, 7],
        response_ids=[10 + index] * tokens,
        loss_mask=[True] * tokens,
        rollout_logprobs=[-0.5] * tokens,
        policy_versions=[3] * tokens,
        status=Status.COMPLETED,
        finish_reason="stop",
        reward=float(index),
        label="4",
    )
