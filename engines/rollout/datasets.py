"""A dataset as the rollout engine sees it: its prompts, and how they are answered and scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import GenerateContext, GenerateFn, load_hook
from rollflow.storage.buffer import Source
from rollflow.storage.config import DataConfig
from rollflow.storage.ledger import IssuedGroup
from rollflow.storage.objects import Store
from rollflow.storage.order import group_ids
from rollflow.storage.prompts import PromptSet, load_prompts
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status

from .client import GenerateClient, sampling_params
from .collector import Episode
from .config import EvalConfig, HooksConfig, RolloutConfig, SamplingConfig
from .engine import RolloutEngine
from .grader import Grader
from .seeds import sample_seed

SINGLE_TURN = "rollflow.engines.rollout.single_turn:generate"
SUPERVISED = "rollflow.engines.rollout.supervised:generate"
SAMPLING = "sampling"
"""Key in a prompt's metadata: sampling parameters of its own, laid over the settings'."""


@dataclass(frozen=True, slots=True)
class Asked:
    """For which step samples are made, by what."""

    run: RunRef
    step: int
    policy_version: int
    engine: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts and what is done with them."""

    sources: list[Source]
    engine: RolloutEngine
    generate: GenerateFn
    grader: Grader
    sampling: dict[str, Any]
    episodes_per_prompt: int
    seed: int
    sampling_of: Any = None
    """The ``sampling`` hook."""

    @property
    def prompts(self) -> list[Prompt]:
        """Of all sources."""
        return [prompt for source in self.sources for prompt in source.prompts.prompts]

    def plan(
        self, prompts: Sequence[Prompt], step: int, taken: Sequence[str] = ()
    ) -> list[IssuedGroup]:
        """Name the groups of these prompts and give them seeds; ``taken`` are prompt ids before."""
        ids = [prompt.prompt_id for prompt in prompts]
        names = group_ids(step, [*taken, *ids])[len(taken) :]
        n = self.episodes_per_prompt
        return [
            IssuedGroup(
                name, prompt_id, n, tuple(sample_seed(self.seed, step, name, i) for i in range(n))
            )
            for name, prompt_id in zip(names, ids, strict=True)
        ]

    def episodes(
        self,
        group: IssuedGroup,
        prompt: Prompt,
        asked: Asked,
        begun: Mapping[int, Sequence[Sample]] | None = None,
    ) -> list[Episode]:
        """What is to be done for a group. ``begun`` has the samples of episodes that were begun."""
        sampling = {**self.sampling, **prompt.metadata.get(SAMPLING, {})}
        if self.sampling_of is not None:
            sampling |= self.sampling_of(prompt, asked.step)
        return [
            self._episode(group, prompt, asked, sampling, index, list((begun or {}).get(index, ())))
            for index in range(group.samples)
        ]

    def _episode(
        self,
        group: IssuedGroup,
        prompt: Prompt,
        asked: Asked,
        sampling: dict[str, Any],
        index: int,
        begun: list[Sample],
    ) -> Episode:
        context = GenerateContext(
            run=asked.run.name,
            step=asked.step,
            group_id=group.group_id,
            index=index,
            seed=group.seeds[index],
            sampling=sampling,
            policy_version=asked.policy_version,
            engine=asked.engine,
            template=self.engine.template,
        )
        ours = [
            replace(s, run=context.run, step=context.step, group_id=context.group_id,
                    episode_id=context.episode_id)
            for s in begun
        ]  # fmt: skip
        cut = [s for s in ours if s.status is Status.ABORTED]
        if ours and not cut:
            return Episode(prompt, context, tuple(ours))
        if len(ours) == 1 and ours[0].response_ids:
            return Episode(prompt, replace(context, partial=ours[0]))
        return Episode(prompt, context)


def by_episode(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """A group's samples by the number of their episode."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(int(sample.episode_id.rpartition("#")[2]), []).append(sample)
    return found


def load_tokenizer(model: ModelConfig) -> Any:
    """transformers' tokenizer of a model, without PyTorch's compiler, which nobody asks for here."""
    from rollflow.engines.cpu.light_imports import no_compiled_masks

    with no_compiled_masks():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)


def takes_groups(rollout: RolloutConfig, sglang: Mapping[str, Any]) -> bool:
    """Whether every server finds the seeds in a request of a whole group: a process of our own start does."""
    ours = rollout.external is None
    return ours and all(
        table.get("tokenizer_worker_num", 1) == 1 for _, table in rollout.tables(sglang)
    )


def training_dataset(
    store: Store,
    tokenizer: Any,
    client: GenerateClient | None,
    data: Sequence[DataConfig],
    rollout: RolloutConfig,
    hooks: HooksConfig,
    *,
    routed_experts: bool = False,
    groups: bool = False,
) -> Dataset:
    """The sources that steps draw from; ValueError names a bad row or hook.

    Prompts are encoded by the settings of the first source. With ``routed_experts`` answers tell
    where the servers sent each token. With ``groups``, see :func:`takes_groups`, the samples
    of a group are asked for in one request, where a step begins all of them at once and no server
    would be left without a group.
    """
    at_once = rollout.wave * rollout.n_samples_per_prompt <= rollout.concurrency
    together = groups and at_once and rollout.wave >= len(rollout.tables({}))
    return _dataset(
        store,
        RolloutEngine(tokenizer, data[0], client, routed_experts=routed_experts, together=together),
        data,
        rollout,
        rollout.generate,
        grader_of(rollout, rollout.reward, rollout.group_reward),
        rollout.sampling,
        rollout.n_samples_per_prompt,
        hooks.sampling,
    )


def eval_dataset(
    store: Store,
    tokenizer: Any,
    client: GenerateClient | None,
    config: EvalConfig,
    rollout: RolloutConfig,
) -> Dataset:
    """An evaluation dataset; ValueError names a bad row or hook."""
    group = config.group_reward
    if group is None:
        group = rollout.group_reward and not config.reward
    return _dataset(
        store,
        RolloutEngine(tokenizer, config.data, client),
        [config.data],
        rollout,
        SUPERVISED if config.loss else config.generate,
        grader_of(rollout, config.reward or rollout.reward, group),
        config.sampling,
        1 if config.loss else config.n_samples_per_prompt,
        "",
    )


def grader_of(rollout: RolloutConfig, path: str, group: bool) -> Grader:
    """The grader at ``path`` with the limits that the settings give it."""
    return Grader(
        path,
        rollout.reward_timeout_s,
        retries=rollout.reward_retries,
        workers=rollout.reward_workers,
        memory_bytes=int(rollout.reward_memory_gb * (1 << 30)),
        group=group,
    )


def _dataset(
    store: Store,
    engine: RolloutEngine,
    data: Sequence[DataConfig],
    rollout: RolloutConfig,
    generate: str,
    grader: Grader,
    sampling: SamplingConfig,
    episodes_per_prompt: int,
    sampling_of: str,
) -> Dataset:
    return Dataset(
        sources=[_source(load_prompts(store, d, engine.reject), d) for d in data],
        engine=engine,
        generate=load_hook(generate or SINGLE_TURN, "generate"),
        grader=grader,
        sampling=sampling_params(sampling),
        episodes_per_prompt=episodes_per_prompt,
        seed=rollout.seed,
        sampling_of=load_hook(sampling_of, "sampling") if sampling_of else None,
    )


def _source(prompts: PromptSet, config: DataConfig) -> Source:
    name = prompts.prompts[0].prompt_id.rpartition(":")[0]
    return Source(name, prompts, config.weight, config.seed, config.shuffle)


def slime_arguments(
    rollout: RolloutConfig, model: ModelConfig, router_url: str | None
) -> dict[str, Any]:
    """The settings under the names that a function written for slime asks its ``args`` for."""
    host, _, port = (router_url or "http://:0").removeprefix("http://").rpartition(":")
    return {
        "hf_checkpoint": model.path,
        "rollout_batch_size": rollout.batch_size,
        "n_samples_per_prompt": rollout.n_samples_per_prompt,
        "over_sampling_batch_size": rollout.wave,
        "rollout_temperature": rollout.sampling.temperature,
        "rollout_top_p": rollout.sampling.top_p,
        "rollout_top_k": rollout.sampling.top_k,
        "rollout_max_response_len": rollout.sampling.max_new_tokens,
        "rollout_stop": rollout.sampling.stop or None,
        "rollout_stop_token_ids": rollout.sampling.stop_token_ids or None,
        "partial_rollout": rollout.early_stop and rollout.partial,
        "group_rm": rollout.group_reward,
        "reward_key": "",
        "rollout_seed": rollout.seed,
        "sglang_router_ip": host,
        "sglang_router_port": int(port),
    }
