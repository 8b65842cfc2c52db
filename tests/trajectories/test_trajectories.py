"""Each algorithm's recipe trains a few steps of the real loop, along the way that is kept.

The loop of ``flows.iteration`` by hand: manager, servers, Megatron rank and store are the real ones,
but servers are started once for all recipes, and the rank runs in this process.
"""

import asyncio
import os
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

os.environ["OMP_NUM_THREADS"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of each package that is not there
    from rollflow.engines.megatron import rank as _rank  # noqa: F401

from rollflow.engines import cluster
from rollflow.engines.algorithms.config import resolved
from rollflow.engines.config import ClusterConfig
from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.rollout.client import GenerateClient
from rollflow.engines.rollout.fleet import Fleet
from rollflow.engines.rollout.frozen import Frozen
from rollflow.engines.rollout.manager import RolloutManager
from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.config import RunConfig
from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import run_ref

from .trajectory import FEW, RECIPES, Trajectory, golden, trajectory, words_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # of megatron-core and torch, not of our calls
    pytest.mark.asyncio(loop_scope="module"),
]


@dataclass
class Started:
    """What all recipes use."""

    folder: Path
    fleet: Fleet
    teacher: Frozen

    def config(self, recipe: str) -> RunConfig:
        words = words_of(recipe, FEW, str(self.folder))
        return load_config(recipes()[recipe], (*words, "--store.url", str(self.folder / "store")))


class Manager(RolloutManager):
    """A manager whose servers were there before it and outlive it."""

    started: Started

    async def _start_servers(self) -> None:
        if self._rollout.servers:
            self._fleet = self.started.fleet
            self._client = GenerateClient(
                self._fleet.router.url,
                timeout_s=60.0,
                max_retries=2,
                wait_ready=self._fleet.wait_ready,
                abort=self._fleet.abort,
                weights=self._fleet,
            )

    async def _start_frozen(self) -> None:
        self._frozen = {"teacher": self.started.teacher} if self._rollout.teacher else {}

    async def stop(self) -> None:
        self._fleet, self._frozen = None, {}
        await super().stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Started]:
    folder = tmp_path_factory.mktemp("trajectories")
    arithmetic.make(folder)
    config = load_config(
        recipes()["arithmetic_distill_cpu"], words_of("arithmetic_distill_cpu", FEW, str(folder))
    )
    ref = cluster.connect(ClusterConfig(), "trajectories")
    fleet = Fleet(config.model, config.rollout, config.sglang, config.router, "cpu", folder)
    assert config.rollout.teacher is not None
    teacher = Frozen(
        "teacher",
        config.rollout.teacher,
        config.rollout,
        config.model,
        config.router,
        "cpu",
        folder,
    )
    try:
        await asyncio.gather(fleet.start(), teacher.start())
        yield Started(folder, fleet, teacher)
    finally:
        await teacher.stop()
        await fleet.stop()
        cluster.disconnect(ref)


async def few_steps(started: Started, recipe: str) -> Trajectory:
    config = started.config(recipe)
    store = Store(config.store)
    run = run_ref(store, config.name)
    Manager.started = started
    manager = Manager(
        run, StoreConfig(url=config.store.url), config.model, [config.data], config.rollout,
        config.hooks, [], config.sglang, config.router, "cpu", str(started.folder),
    )  # fmt: skip
    rank = TrainerRank(
        0, 1, run, config.store, config.model, config.trainer, config.megatron,
        resolved(config.algorithm, config.rollout.sampling.max_new_tokens), config.gates,
        config.rollout.sampling.temperature, config.steps, "cpu",
    )  # fmt: skip
    generated, trained, digest = [], [], ""
    try:
        await manager.start()
        rank.setup(rank.address())
        rank.restore(None)
        for step in range(FEW.steps):
            if config.rollout.servers:
                pushed = rank.push_weights((await manager.info()).server_urls, step)
                assert not pushed.failed
            groups = await manager.score(await manager.generate(step, step))
            batch = await manager.write(groups)
            result = rank.train(batch)
            generated.append(batch.metrics)
            trained.append(result.metrics)
            digest = result.weights_digest
    finally:
        rank.stop()
        await manager.stop()
    return trajectory(config.algorithm.name, generated, trained, digest)


@pytest.mark.parametrize("recipe", RECIPES)
async def test_a_recipe_begins_along_its_golden_trajectory(started, recipe):
    way = await few_steps(started, recipe)
    assert way.differences(golden(FEW)[recipe]) == []
    assert max(way.grad_norm) > 0


@pytest.mark.parametrize("recipe", RECIPES)
async def test_a_recipe_is_named_after_its_algorithm(recipe):
    config = load_config(recipes()[recipe], ())
    words = recipe.removeprefix("arithmetic_").removesuffix("cpu").strip("_")
    assert config.algorithm.name == (words or "grpo")
