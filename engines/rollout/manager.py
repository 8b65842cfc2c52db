"""The rollout engine as one Ray actor: a step's batch from prompts to a committed manifest."""

import asyncio
import gc
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from rollflow.engines.config import ModelConfig
from rollflow.engines.platform import Device
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.ledger import IssuedGroup, durable_groups, issue
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, GroupsRef, RunRef
from rollflow.storage.samples import Prompt, Sample, Status
from rollflow.storage.shards import ShardWriter

from .client import GenerateClient
from .collector import Collector, Episode
from .config import EvalConfig, RolloutConfig
from .datasets import Dataset, eval_dataset, training_dataset
from .fleet import Fleet


@dataclass(frozen=True, slots=True)
class RolloutInfo:
    """What runs, e.g. for a log line; empty lists where the run has no servers."""

    router_url: str
    server_urls: list[str]
    pids: list[int]
    """Session leaders of the servers, then of the router."""
    manager_pid: int


class RolloutManager:
    """Owns router, servers, client, hooks and shard writer of one run.

    ``sglang`` and ``router`` are the user's tables. Logs of servers and router go to ``log_dir``.
    """

    def __init__(
        self,
        run: RunRef,
        store: StoreConfig,
        model: ModelConfig,
        data: DataConfig,
        rollout: RolloutConfig,
        evals: Sequence[EvalConfig],
        sglang: Mapping[str, Any],
        router: Mapping[str, Any],
        device: Device,
        log_dir: str,
    ) -> None:
        self._run = run
        self._store = Store(store)
        self._model = model
        self._data = data
        self._rollout = rollout
        self._evals = list(evals)
        self._sglang = sglang
        self._router = router
        self._device: Device = device
        self._log_dir = Path(log_dir)
        self._fleet: Fleet | None = None
        self._client: GenerateClient | None = None
        self._training: Dataset
        self._eval_datasets: dict[str, Dataset] = {}
        self._running: dict[tuple[str | None, int], asyncio.Task[Collector]] = {}
        self._collectors: dict[int, Collector] = {}
        """Batches that are generated and not written yet, by step."""

    async def start(self) -> RolloutInfo:
        """Start servers and router and load prompts; ServerError or ValueError when that fails."""
        servers = asyncio.create_task(self._start_servers())
        tokenizer = await asyncio.to_thread(self._load_tokenizer)
        await servers
        await asyncio.to_thread(self._load_datasets, tokenizer)
        gc.freeze()  # else each full collection looks through all that was imported, 0.3 s a time
        return await self.info()

    async def info(self, *, whole: bool = False) -> RolloutInfo:
        """What runs now; ``whole`` waits for servers that are being started again."""
        if self._fleet is None:
            return RolloutInfo("", [], [], os.getpid())
        servers = await self._fleet.servers(self._rollout.servers if whole else 1)
        return RolloutInfo(
            router_url=self._fleet.router.url,
            server_urls=[s.url for s in servers],
            pids=[*(s.pid for s in servers), self._fleet.router.pid],
            manager_pid=os.getpid(),
        )

    async def server_urls(self) -> list[str]:
        """The servers that are up, to push weights to.

        One that is being started again gets its weights from the trainer when it joins.
        """
        return (await self.info()).server_urls

    async def attach_trainer(self, names: Sequence[str], namespace: str) -> None:
        """Let a server that was started again get its weights from these trainer actors."""
        if self._fleet is None:
            return
        ranks = [ray.get_actor(name, namespace=namespace) for name in names]

        async def load(url: str, version: int) -> object:
            return await asyncio.gather(*(r.push_weights.remote([url], version) for r in ranks))

        self._fleet.load_weights = load

    async def generate(self, step: int, policy_version: int) -> GroupsRef:
        """Generate a step's groups with the weights of ``policy_version``.

        Scoring goes on, and parts are written, while others still generate. Called again for a
        step that is not written yet, it starts the step anew.
        """
        n, data = self._rollout.batch_size, self._data
        prompts = self._training.prompts.draw(step, n, data.seed, data.shuffle)
        if step in self._collectors:
            await self._collectors.pop(step).cancel()
        collector = await self._collect(self._training, prompts, step, policy_version, None)
        self._collectors[step] = collector
        return GroupsRef(
            run=self._run,
            step=step,
            groups=len(prompts),
            samples=collector.generated,
            policy_version=policy_version,
            timings=dict(collector.seconds),
        )

    async def score(self, groups: GroupsRef) -> GroupsRef:
        """Wait for the graders that still run; the ref has the batch's rollout metrics."""
        collector = self._collector(groups.step)
        await collector.score()
        metrics = {**collector.tally.metrics("rollout"), **_timings(collector)}
        return replace(groups, timings=dict(collector.seconds), metrics=metrics)

    async def write(self, groups: GroupsRef) -> BatchRef:
        """Write the last part and the manifest: commit point A."""
        if groups.step not in self._collectors:
            written = await asyncio.to_thread(find_batch, self._store, self._run, groups.step)
            if written is not None:
                return written
        collector = self._collector(groups.step)
        if collector.errors.total() == collector.generated:
            [(error, count)] = collector.errors.most_common(1)
            raise ValueError(
                f"step {groups.step}: all {collector.generated} samples failed, {count} of them with "
                f"{error!r}; nothing was committed, the run goes on once the cause is mended"
            )
        ref = await self._commit(collector, groups.step, None)
        del self._collectors[groups.step]
        return ref

    async def evaluate(self, name: str, step: int, policy_version: int) -> BatchRef:
        """Answer and score every prompt of an evaluation dataset; kept under ``evals/{name}``.

        An evaluation that is committed already is not done again.
        """
        if name not in self._eval_datasets:
            known = ", ".join(e.name for e in self._evals) or "none"
            raise ValueError(f"evaluation dataset {name!r} is not in evals (known: {known})")
        done = await asyncio.to_thread(find_batch, self._store, self._run, step, name)
        if done is not None:
            return done
        dataset = self._eval_datasets[name]
        prompts = dataset.prompts.prompts
        collector = await self._collect(dataset, prompts, step, policy_version, name)
        await collector.score()
        return await self._commit(collector, step, name)

    async def pause(self) -> None:
        """Hold every server between two tokens, e.g. while weights change under long requests."""
        await self._post("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Let paused servers go on."""
        await self._post("/continue_generation", {})

    async def flush(self) -> None:
        """Empty every server's prefix cache: it holds keys and values of other weights."""
        await self._post("/flush_cache", {})

    async def stop(self) -> None:
        """End servers and router."""
        for task in self._running.values():
            task.cancel()
        for collector in self._collectors.values():
            await collector.cancel()
        if self._client is not None:
            await self._client.close()
        if self._fleet is not None:
            await self._fleet.stop()
        self._fleet = self._client = None

    async def _start_servers(self) -> None:
        rollout = self._rollout
        if not rollout.servers:
            return
        self._fleet = Fleet(
            self._model, rollout, self._sglang, self._router, self._device, self._log_dir
        )
        await self._fleet.start()
        self._client = GenerateClient(
            self._fleet.router.url,
            timeout_s=rollout.request_timeout_s,
            max_retries=rollout.max_retries,
            wait_ready=self._fleet.wait_ready,
        )

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )

    def _load_datasets(self, tokenizer: Any) -> None:
        store, client, rollout = self._store, self._client, self._rollout
        self._training = training_dataset(store, tokenizer, client, self._data, rollout)
        for config in self._evals:
            dataset = eval_dataset(store, tokenizer, client, config, rollout)
            self._eval_datasets[config.name] = dataset

    async def _collect(
        self,
        dataset: Dataset,
        prompts: Sequence[Prompt],
        step: int,
        policy_version: int,
        name: str | None,
    ) -> Collector:
        """Generate a batch; one of the same name that still runs is given up first."""
        key = (name, step)
        if (before := self._running.pop(key, None)) is not None:
            before.cancel()
            await asyncio.wait({before})
        task = asyncio.create_task(
            self._generate_batch(dataset, prompts, step, policy_version, name)
        )
        self._running[key] = task
        try:
            return await task
        finally:
            if self._running.get(key) is task:
                del self._running[key]

    async def _generate_batch(
        self,
        dataset: Dataset,
        prompts: Sequence[Prompt],
        step: int,
        policy_version: int,
        name: str | None,
    ) -> Collector:
        folder = batch_folder(self._run, step, name)
        collector = Collector(
            dataset.engine,
            dataset.generate,
            dataset.grader,
            await asyncio.to_thread(ShardWriter, self._store, self._run, folder),
            self._rollout.concurrency,
            self._rollout.shard_groups,
        )
        engine = f"sglang {importlib.metadata.version('sglang')}" if self._fleet else ""
        groups = dataset.episodes(prompts, self._run, step, policy_version, engine)
        if name is None:
            done = await asyncio.to_thread(self._durable, groups, step, policy_version)
            for group in done.values():
                collector.adopt(group)
            groups = [group for group in groups if group[0].context.group_id not in done]
        serving = self._fleet.serving(policy_version) if self._fleet else nullcontext()
        async with serving:
            await collector.generate(groups)
        return collector

    def _durable(
        self, groups: Sequence[Sequence[Episode]], step: int, policy_version: int
    ) -> dict[str, list[Sample]]:
        """Issue the step's groups; the samples of those that an earlier attempt left whole."""
        plan = [
            IssuedGroup(
                group_id=group[0].context.group_id,
                prompt_id=group[0].prompt.prompt_id,
                samples=len(group),
                seeds=tuple(episode.context.seed for episode in group),
            )
            for group in groups
        ]
        standing = issue(self._store, self._run, step, plan, policy_version)
        if list(standing.groups) != plan:
            raise ValueError(
                f"step {step} was issued with other prompts or seeds than its settings give now; "
                f"has {self._data.path} changed since the run began?"
            )
        durable = durable_groups(self._store, self._run, step)
        for damage in durable.skipped:
            logging.getLogger("rollflow").warning("not taken, generated again: %s", damage)
        found: dict[str, list[Sample]] = {}
        for sample in durable.samples:
            found.setdefault(sample.group_id, []).append(sample)
        # A group that failed as a whole is worth another try; anything else stays as it is.
        return {k: v for k, v in found.items() if any(s.status is not Status.FAILED for s in v)}

    async def _commit(self, collector: Collector, step: int, name: str | None) -> BatchRef:
        parts = await collector.write()
        tally = collector.tally
        prefix = "rollout" if name is None else f"eval/{name}"
        return await asyncio.to_thread(
            commit_batch,
            self._store,
            self._run,
            batch_folder(self._run, step, name),
            step,
            parts,
            groups=tally.groups,
            policy_versions=sorted(tally.versions),
            metrics={**tally.metrics(prefix), **(_timings(collector) if name is None else {})},
            ledger={"prompt_epoch": self._epoch(step)} if name is None else {},
            dataset=name,
        )

    def _epoch(self, step: int) -> int:
        return self._training.prompts.epoch_of(step, self._rollout.batch_size)

    def _collector(self, step: int) -> Collector:
        if step not in self._collectors:
            raise ValueError(
                f"step {step} has no groups here (generated: {sorted(self._collectors)}); "
                "generate it first"
            )
        return self._collectors[step]

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        if self._fleet is not None:
            await self._fleet.post(path, body)


def _timings(collector: Collector) -> dict[str, float]:
    tokens = collector.tally.tokens
    return {
        **{f"perf/{name}": seconds for name, seconds in collector.seconds.items()},
        "perf/tokens": float(tokens),
        "perf/tokens_per_s": tokens / max(collector.seconds["generate_s"], 1e-9),
    }
