"""Real stores, on disk, in memory and on two S3 servers, and samples to put into them."""

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter
from tests.object_stores import BUCKET, ENVIRONMENT, Kind, ObjectStoreServer, install

STORES = os.environ.get("ROLLFLOW_TEST_STORES", "file memory rclone").split()
"""Where every test with a ``store`` runs; moto answers ten times as slowly as rclone."""
ALL_STORES = ["file", "memory", "rclone", "moto"]
"""Where the tests of the object client itself run."""


def pytest_generate_tests(metafunc) -> None:
    if "store" in metafunc.fixturenames:
        kinds = ALL_STORES if metafunc.module.__name__.endswith("test_objects") else STORES
        metafunc.parametrize("store", kinds, indirect=True)


@pytest.fixture
def store(request, tmp_path) -> Store:
    place = uuid.uuid4().hex
    if request.param == "file":
        return Store(StoreConfig(url=str(tmp_path / "store")))
    if request.param == "memory":
        return Store(StoreConfig(url=f"memory://{place}"))
    return s3_store(request.getfixturevalue(request.param), place)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory) -> Iterator[ObjectStoreServer]:
    yield from serving("rclone", tmp_path_factory)


@pytest.fixture(scope="session")
def moto(tmp_path_factory) -> Iterator[ObjectStoreServer]:
    yield from serving("moto", tmp_path_factory)


def serving(kind: Kind, tmp_path_factory) -> Iterator[ObjectStoreServer]:
    install()
    server = ObjectStoreServer(kind, tmp_path_factory.mktemp(kind) / "objects")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server.start()
        yield server
    server.kill()


def s3_store(server: ObjectStoreServer, prefix: str, **changes) -> Store:
    url, options = f"s3://{BUCKET}/{prefix}", {"endpoint_url": server.endpoint}
    return Store(StoreConfig(url=url, options=options, **changes))


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
