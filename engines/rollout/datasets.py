"""A dataset as the rollout engine sees it: its prompts, and how they are answered and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollflow.engines.hooks import GenerateContext, GenerateFn, load_hook
from rollflow.storage.config import DataConfig
from rollflow.storage.objects import Store
from rollflow.storage.order import group_ids
from rollflow.storage.prompts import PromptSet, load_prompts
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt

from .client import GenerateClient, sampling_params
from .collector import Episode
from .config import EvalConfig, RolloutConfig, SamplingConfig
from .engine import RolloutEngine
from .grader import Grader
from .seeds import sample_seed

SINGLE_TURN = "rollflow.engines.rollout.single_turn:generate"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts and what is done with them."""

    prompts: PromptSet
    engine: RolloutEngine
    generate: GenerateFn
    grader: Grader
    sampling: dict[str, Any]
    episodes_per_prompt: int
    seed: int

    def episodes(
        self,
        prompts: Sequence[Prompt],
        run: RunRef,
        step: int,
        policy_version: int,
        engine_name: str,
    ) -> list[list[Episode]]:
        """What is to be done for these prompts: a list of episodes for each group."""
        names = group_ids(step, [p.prompt_id for p in prompts])
        return [
            [
                Episode(
                    prompt,
                    GenerateContext(
                        run=run.name,
                        step=step,
                        group_id=group_id,
                        index=index,
                        seed=sample_seed(self.seed, step, group_id, index),
                        sampling=self.sampling,
                        policy_version=policy_version,
                        engine=engine_name,
                        template=self.engine.template,
                    ),
                )
                for index in range(self.episodes_per_prompt)
            ]
            for prompt, group_id in zip(prompts, names, strict=True)
        ]


def training_dataset(
    store: Store,
    tokenizer: Any,
    client: GenerateClient | None,
    data: DataConfig,
    rollout: RolloutConfig,
) -> Dataset:
    """The dataset that steps draw from; ValueError names a bad row or hook."""
    return _dataset(
        store,
        RolloutEngine(tokenizer, data, client),
        data,
        rollout,
        rollout.generate,
        rollout.reward,
        rollout.sampling,
        rollout.n_samples_per_prompt,
    )


def eval_dataset(
    store: Store,
    tokenizer: Any,
    client: GenerateClient | None,
    config: EvalConfig,
    rollout: RolloutConfig,
) -> Dataset:
    """An evaluation dataset; ValueError names a bad row or hook."""
    return _dataset(
        store,
        RolloutEngine(tokenizer, config.data, client),
        config.data,
        rollout,
        config.generate,
        config.reward or rollout.reward,
        config.sampling,
        config.n_samples_per_prompt,
    )


def _dataset(
    store: Store,
    engine: RolloutEngine,
    data: DataConfig,
    rollout: RolloutConfig,
    generate: str,
    reward: str,
    sampling: SamplingConfig,
    episodes_per_prompt: int,
) -> Dataset:
    return Dataset(
        prompts=load_prompts(store, data, engine.reject),
        engine=engine,
        generate=load_hook(generate or SINGLE_TURN, "generate"),
        grader=Grader(reward, rollout.reward_timeout_s),
        sampling=sampling_params(sampling),
        episodes_per_prompt=episodes_per_prompt,
        seed=rollout.seed,
    )
