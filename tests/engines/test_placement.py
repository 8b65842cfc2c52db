"""Trainer ranks get their places in a Ray cluster together, or a reason why not."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from rollflow.engines import cluster, placement
from rollflow.engines.cluster import DeadlineError
from rollflow.engines.platform import SHARE, Platform

CPU = Platform("cpu", "gloo")
CUDA = Platform("cuda", "cpu:gloo,cuda:nccl", 2)


class Engine:
    """Stands for a rank, a server or the manager that starts one."""

    def __init__(self) -> None:
        self.child: Any = None

    def gpus(self):
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    def group(self):
        return ray.get_runtime_context().get_placement_group_id()

    async def gpus_of_a_child(self):
        make: Any = ray.remote(num_cpus=0, num_gpus=SHARE)(Engine)
        self.child = make.remote()
        return await self.child.gpus.remote()


@pytest.fixture(scope="module")
def two_gpus():
    """A private Ray that believes in two GPUs."""
    folder = tempfile.mkdtemp(prefix="rf-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        cluster._start_private("placement-tests", folder, 2)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def give_back(two_gpus):
    yield
    placement.release()


def start(name, group, rank, gpus, *, with_children=False):
    strategy = placement.in_bundle(group, rank, with_children=with_children)
    cluster.start_actor(Engine, name, gpus=gpus, scheduling_strategy=strategy)
    return cluster.find_actor(name)


@pytest.mark.usefixtures("give_back")
async def test_each_rank_has_a_gpu_of_its_own_until_the_place_is_given_back():
    group = await placement.reserve(2, CUDA, "STRICT_PACK", timeout_s=60)
    ranks = [start(f"trainer-{r}", group, r, 1) for r in range(2)]
    assert [await r.gpus.remote() for r in ranks] in ([["0"], ["1"]], [["1"], ["0"]])
    assert [await r.group.remote() for r in ranks] == [group.id.hex()] * 2
    placement.release()
    for rank in ranks:
        async with asyncio.timeout(30):
            with pytest.raises(RayActorError):
                while True:
                    await rank.gpus.remote()
    again = await placement.reserve(2, CUDA, "PACK", timeout_s=60)
    assert again.id != group.id


@pytest.mark.usefixtures("give_back")
async def test_a_rank_and_the_server_that_the_manager_starts_share_a_gpu():
    group = await placement.reserve(1, CUDA, "STRICT_PACK", timeout_s=60)
    manager = start("rollout", group, 0, 0, with_children=True)
    server = await manager.gpus_of_a_child.remote()
    rank = start("trainer-0", group, 0, SHARE)
    assert server == await rank.gpus.remote()


@pytest.mark.usefixtures("give_back")
async def test_ranks_without_room_are_named_with_what_the_cluster_has():
    with pytest.raises(
        DeadlineError,
        match=r"trainer.ranks = 3: 3 bundles of GPU 1, cluster.placement = 'STRICT_PACK', are not "
        r"placed \(\w+\); the cluster has 127.0.0.1: GPU 2, 2 free",
    ):
        await placement.reserve(3, CUDA, "STRICT_PACK", timeout_s=0)
    assert await placement.reserve(2, CUDA, "STRICT_PACK", timeout_s=60)


@pytest.mark.usefixtures("give_back")
async def test_a_laptop_has_room_for_more_ranks_than_cores():
    group = await placement.reserve(64, CPU, "STRICT_PACK", timeout_s=60)
    rank = start("on-a-cpu", group, 63, 0)
    assert await rank.group.remote() == group.id.hex()
