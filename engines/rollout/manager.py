"""The rollout engine as one Ray actor: a step's batch from prompts to a committed manifest."""

import asyncio
import gc
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import HookKind, load_hook, set_arguments
from rollflow.engines.platform import Device
from rollflow.engines.published import place_of
from rollflow.engines.rewards.remote import URL as REWARD_URL
from rollflow.storage.buffer import stored_state
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.integrity import ManifestError
from rollflow.storage.manifests import find_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, GroupsRef, RunRef
from rollflow.storage.samples import Sample

from .attempts import Attempts
from .client import GIVE_UP_S, STOP_TIMEOUT_S, GenerateClient
from .config import EvalConfig, HooksConfig, RolloutConfig
from .datasets import (
    Asked,
    Dataset,
    eval_dataset,
    load_tokenizer,
    slime_arguments,
    takes_groups,
    training_dataset,
)
from .evaluation import Evaluation
from .experts import SWITCH
from .filters import load_dynamic_filter
from .fleet import Fleet
from .frozen import Frozen
from .producer import Producer, Production, make_buffer
from .server import RolloutInfo
from .teacher import Teacher
from .trained_on import load_trained_on
from .trainer import Trainer


class RolloutManager:
    """Owns router, servers, client, hooks and shard writer of one run.

    ``sglang`` and ``router`` are the user's tables. Logs of servers and router go to ``log_dir``.
    ``shares_gpu``: a trainer rank computes on the servers' GPU.
    """

    def __init__(
        self,
        run: RunRef,
        store: StoreConfig,
        model: ModelConfig,
        data: Sequence[DataConfig],
        rollout: RolloutConfig,
        hooks: HooksConfig,
        evals: Sequence[EvalConfig],
        sglang: Mapping[str, Any],
        router: Mapping[str, Any],
        device: Device,
        log_dir: str,
        shares_gpu: bool = False,
    ) -> None:
        self._run = run
        self._store = Store(store)
        self._model = model
        self._data = list(data)
        self._rollout = rollout
        self._hooks = hooks
        self._evals = list(evals)
        self._sglang = sglang
        self._router = router
        self._device: Device = device
        self._log_dir = Path(log_dir)
        self._shares_gpu = shares_gpu
        self._fleet: Fleet | None = None
        self._client: GenerateClient | None = None
        self._frozen: dict[str, Frozen] = {}
        self._trainer: Trainer | None = None
        """Once it is attached."""
        self._training: Dataset
        self._eval_datasets: dict[str, Dataset] = {}
        self._slots = asyncio.Semaphore(rollout.concurrency)
        self._production: Production | None = None
        self._attempts = Attempts()
        self._producers: dict[int, Producer] = {}
        """Batches that are generated and not written yet, by step."""

    async def start(self) -> RolloutInfo:
        """Start servers and router and load prompts; ServerError or ValueError when that fails."""
        servers = asyncio.gather(self._start_servers(), self._start_frozen())
        tokenizer = await asyncio.to_thread(load_tokenizer, self._model)
        await servers
        await asyncio.to_thread(self._load_datasets, tokenizer)
        self._production = await asyncio.to_thread(self._open_production)
        for dataset in self._datasets:
            await dataset.grader.start()
        gc.freeze()  # else each full collection looks through all that was imported, 0.3 s a time
        return replace(await self.info(), notices=self._notices())

    async def info(self, *, whole: bool = False) -> RolloutInfo:
        """What runs now; ``whole`` waits for servers that are being started again."""
        if self._fleet is None:
            return RolloutInfo("", [], [], os.getpid())
        least = 0 if self._rollout.external else 1
        wanted = len(self._rollout.tables({}))
        servers = await self._fleet.servers(wanted if whole else least)
        return RolloutInfo(
            router_url=self._fleet.router.url,
            server_urls=[s.url for s in servers],
            pids=[*(s.pid for s in servers), self._fleet.router.pid],
            manager_pid=os.getpid(),
        )

    async def targets(self) -> tuple[list[str], str]:
        """(the servers of ours that are up, to push weights to; the URL of the folder in which the
        trainer publishes them for those of others, empty where there are none).

        One that is being started again gets its weights from the trainer when it joins.
        """
        return (await self.info()).server_urls, self._place

    async def attach_trainer(self, names: Sequence[str], namespace: str, timeout_s: float) -> None:
        """Let a server that was started again get its weights from these trainer actors.

        They also tell the losses that evaluations ask for. Each call ends after ``timeout_s``.
        """
        self._trainer = trainer = Trainer(names, namespace, timeout_s)
        if self._fleet is None:
            return
        self._fleet.load_weights = trainer.load
        if self._fleet.external:
            self._fleet.external.publish = lambda version: trainer.push([], version, self._place)

    async def generate(self, step: int, policy_version: int) -> GroupsRef:
        """Generate and score a step's groups; the servers hold ``policy_version``, or newer later.

        Parts are written while others still generate. Called again for a step that is not written
        yet, it starts the step anew.
        """
        assert self._production is not None
        producer = Producer(self._production, step, policy_version)
        if (before := self._producers.pop(step, None)) is not None:
            await before.collector.cancel()
        await self._attempts.alone((None, step), self._fill(producer, policy_version))
        self._producers[step] = producer
        collector = producer.collector
        return GroupsRef(
            run=self._run,
            step=step,
            groups=len(collector.members),
            samples=sum(len(outcome.samples) for outcome in collector.members),
            policy_version=policy_version,
            timings=dict(collector.seconds),
        )

    async def score(self, groups: GroupsRef) -> GroupsRef:
        """The ref with the batch's rollout metrics: every grader has finished by now."""
        return replace(groups, metrics=self._metrics(self._producer(groups.step)))

    async def write(self, groups: GroupsRef) -> BatchRef:
        """Write the last part and the manifest: commit point A."""
        if groups.step not in self._producers:
            written = await asyncio.to_thread(find_batch, self._store, self._run, groups.step)
            if written is not None:
                return written
        producer = self._producer(groups.step)
        collector = producer.collector
        samples = [sample for outcome in collector.members for sample in outcome.samples]
        if collector.errors.total() == len(samples):
            [(error, count)] = collector.errors.most_common(1)
            raise ValueError(
                f"step {groups.step}: all {len(samples)} samples failed, {count} of them with "
                f"{error!r}; nothing was committed, the run goes on once the cause is mended"
            )
        ref = await producer.commit(self._metrics(producer))
        del self._producers[groups.step]
        await self._show(self._hooks.batch_samples, "batch_samples", samples, groups.step)
        return ref

    async def hold(self, version: int) -> tuple[list[str], str]:
        """Stop all generation between two tokens, for the weights of ``version``; see :meth:`targets`.

        Answers in flight go on from where they stand after :meth:`release`.
        """
        if self._fleet is not None and self._client is not None:
            await self._client.hold()
            await self._fleet.turns.wake()
        return await self.targets()

    async def release(self, version: int) -> list[str]:
        """Let generation go on, under the weights of ``version``; what befell servers of others."""
        if self._fleet is not None and self._client is not None:
            await self._fleet.update(version)
            self._client.release()
        return self._notices()

    async def sleep(self) -> float:
        """Leave the GPU to the trainer: the servers give back all memory that they can; seconds.

        Nothing may be generated until :meth:`hold`, new weights and :meth:`release`.
        """
        return 0.0 if self._fleet is None else await self._fleet.turns.sleep()

    async def wake(self) -> None:
        """Take the GPU's memory back: the trainer needs little of it from here on."""
        if self._fleet is not None:
            await self._fleet.turns.wake()

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
        evaluation = self._evaluation(name, step, policy_version)
        try:
            return await self._attempts.alone((name, step), evaluation)
        except ManifestError:  # an evaluation beside the training may have been faster
            done = await asyncio.to_thread(find_batch, self._store, self._run, step, name)
            if done is None:
                raise
            return done

    async def stop(self) -> None:
        """End servers and router."""
        self._attempts.cancel()
        for producer in self._producers.values():
            await producer.collector.cancel()
        for dataset in self._datasets if self._production else []:
            await dataset.grader.stop()
        for frozen in self._frozen.values():
            await frozen.stop()
        if self._client is not None:
            await self._client.close()
        if self._fleet is not None:
            await self._fleet.stop()
        self._fleet = self._client = None

    async def _start_servers(self) -> None:
        rollout = self._rollout
        if not rollout.generates:
            return
        self._fleet = Fleet(
            self._model,
            rollout,
            self._sglang,
            self._router,
            self._device,
            self._log_dir,
            shares_gpu=self._shares_gpu,
            run=self._run,
        )
        await self._fleet.start()
        self._client = GenerateClient(
            self._fleet.router.url,
            timeout_s=rollout.request_timeout_s,
            max_retries=rollout.max_retries,
            wait_ready=self._fleet.wait_ready,
            abort=self._fleet.abort,
            weights=self._fleet,
            give_up_s=GIVE_UP_S if rollout.external else STOP_TIMEOUT_S,
            affinity=rollout.affinity,
        )
        self._fleet.recall = self._client.recall

    async def _start_frozen(self) -> None:
        """The models beside the policy. Reward functions, in whatever process, learn the judge's URL
        from the environment."""
        rollout = self._rollout
        for name, config in (("teacher", rollout.teacher), ("judge", rollout.judge)):
            if config is not None:
                self._frozen[name] = Frozen(
                    name, config, rollout, self._model, self._router, self._device, self._log_dir
                )
        await asyncio.gather(*(frozen.start() for frozen in self._frozen.values()))
        if (judge := self._frozen.get("judge")) is not None:
            os.environ[REWARD_URL] = judge.url

    def _load_datasets(self, tokenizer: Any) -> None:
        store, client, rollout, hooks = self._store, self._client, self._rollout, self._hooks
        set_arguments(slime_arguments(rollout, self._model, self._fleet and self._fleet.router.url))
        self._training = training_dataset(
            store,
            tokenizer,
            client,
            self._data,
            rollout,
            hooks,
            routed_experts=bool(self._sglang.get(SWITCH)),
            groups=takes_groups(rollout, self._sglang),
        )
        for config in self._evals:
            dataset = eval_dataset(store, tokenizer, client, config, rollout)
            self._eval_datasets[config.name] = dataset

    def _open_production(self) -> Production:
        rollout, hooks, teacher = self._rollout, self._hooks, self._frozen.get("teacher")
        buffer = make_buffer(self._training, rollout, hooks, stored_state(self._store, self._run))
        return Production(
            run=self._run,
            store=self._store,
            rollout=rollout,
            dataset=self._training,
            buffer=buffer,
            client=self._client,
            slots=self._slots,
            engine=self._engine_name,
            dynamic_filter=(
                load_dynamic_filter(hooks.dynamic_filter) if hooks.dynamic_filter else None
            ),
            trained_on=load_trained_on(hooks.sample_filter, rollout.mask_stale),
            annotate=Teacher(teacher).annotate if teacher else None,
        )

    @property
    def _datasets(self) -> list[Dataset]:
        return [self._training, *self._eval_datasets.values()]

    @property
    def _engine_name(self) -> str:
        return f"sglang {importlib.metadata.version('sglang')}" if self._fleet else ""

    async def _fill(self, producer: Producer, policy_version: int) -> None:
        async with self._serving(policy_version):
            await producer.fill()

    async def _evaluation(self, name: str, step: int, policy_version: int) -> BatchRef:
        [config] = [e for e in self._evals if e.name == name]
        evaluation = Evaluation(
            self._store,
            config,
            self._eval_datasets[name],
            Asked(self._run, step, policy_version, self._engine_name),
        )
        if config.loss:
            assert self._trainer is not None
            ref, samples = await evaluation.by_loss(self._trainer.loss_of)
        else:
            async with self._serving(policy_version):
                ref, samples = await evaluation.by_answers(
                    self._client, self._slots, self._rollout.shard_groups
                )
        await self._show(self._hooks.eval_samples, "eval_samples", samples, step)
        return ref

    def _serving(self, policy_version: int) -> AbstractAsyncContextManager[None]:
        return self._fleet.serving(policy_version) if self._fleet else nullcontext()

    @property
    def _place(self) -> str:
        others = self._rollout.external
        return place_of(others.weights, self._run) if others else ""

    def _notices(self) -> list[str]:
        others = self._fleet and self._fleet.external
        found = list(others.notices) if others else []
        if others:
            others.notices.clear()
        return found

    def _metrics(self, producer: Producer) -> dict[str, float]:
        others = self._fleet and self._fleet.external
        return {
            **producer.collector.tally.metrics("rollout"),
            **producer.metrics(),
            **producer.collector.timings,
            **({"rollout/external_servers": float(others.in_service)} if others else {}),
        }

    async def _show(self, path: str, kind: HookKind, samples: list[Sample], step: int) -> None:
        """Give samples to a hook that looks at them; what it raises is told and changes nothing."""
        if not path:
            return
        try:
            await asyncio.to_thread(load_hook(path, kind), samples, step)
        except Exception as error:  # noqa: BLE001 - the function is the user's: it may raise anything
            logging.getLogger("rollflow").warning("hooks.%s raised %r", kind, error)

    def _producer(self, step: int) -> Producer:
        if step not in self._producers:
            raise ValueError(
                f"step {step} has no groups here (generated: {sorted(self._producers)}); "
                "generate it first"
            )
        return self._producers[step]
