"""The functions that a user brings, as types, and what they are given."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rollflow.storage.kept import Kept
from rollflow.storage.samples import Message, Prompt, Sample, Status

Reward = float | Mapping[str, float]
"""A score, or named scores of which ``reward`` is the one trained on and the rest are its parts."""

RewardFn = Callable[[Sample], Reward | Awaitable[Reward]]
"""Scores one sample. A plain function runs in processes of its own, an ``async`` one on an event loop."""

GroupRewardFn = Callable[[list[Sample]], Sequence[Reward] | Awaitable[Sequence[Reward]]]
"""Scores all samples of a group together: a reward for each, in their order."""

DynamicFilterFn = Callable[[list[Sample]], bool | str | tuple[bool, str]]
"""Whether a scored group is to be trained on: True, or False, or why not."""

SampleFilterFn = Callable[[list[Sample]], Sequence[bool]]
"""Which samples of a scored group are trained on; the others stay for the group's statistics."""

SamplingFn = Callable[[Prompt, int], Mapping[str, Any]]
"""Sampling parameters for a prompt at a step, laid over the settings' own."""

PriorityFn = Callable[[Kept], float]
"""The group that waits in the data buffer with the lowest number is drawn first."""

BufferFilterFn = Callable[[list[Kept], int], Sequence[Kept]]
"""Which of the waiting groups may be drawn at a step."""

CurriculumFn = Callable[[int, dict[str, float]], Mapping[str, float]]
"""The sources' weights at a step, given those of the settings."""

SamplesFn = Callable[[list[Sample], int], None]
"""Looks at a committed batch, or at an evaluation, and its step; changes nothing."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine answered to one request."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token as it was sampled (nats)."""
    finish_reason: Literal["stop", "length", "abort"]
    """``abort``: the step has enough and cut this off; return what there is, as ``aborted``."""
    policy_version: int
    """Of the weights that sampled the last token."""
    cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache."""
    seconds: float = 0.0
    policy_versions: list[int] = field(default_factory=list[int])
    """Of the weights that sampled each token: they may change while an answer is generated. All
    ``policy_version`` unless given."""
    routed_experts: bytes | None = None
    """Under router replay: what a sample keeps as ``routed_experts``, of all tokens of the request and
    of the answer but the last."""

    def __post_init__(self) -> None:
        if not self.policy_versions:
            versions = [self.policy_version] * len(self.token_ids)
            object.__setattr__(self, "policy_versions", versions)


class GenerateEngine(Protocol):
    """What a generate hook may ask of the rollout engine."""

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        ...

    @property
    def judge_url(self) -> str:
        """Where the frozen model of ``rollout.judge`` answers; empty where there is none."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, through the chat template where the data settings ask for it."""
        ...

    def render(
        self, prompt: Prompt, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Text of messages by the chat template, as it renders this prompt's."""
        ...

    async def generate(
        self, input_ids: list[int], sampling: dict[str, Any], seed: int
    ) -> Completion:
        """Continue ``input_ids``. ``sampling`` has SGLang's names; faults are retried inside."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateContext:
    """Which sample a generate hook is asked for."""

    run: str
    step: int
    group_id: str
    index: int
    """Which of the group's episodes this is, from 0."""
    seed: int
    """The sample's own seed: a pure function of the run's seed, the step, the prompt and the index."""
    sampling: dict[str, Any]
    policy_version: int
    """Version of the weights that the step samples with."""
    engine: str = ""
    """Engine and version, e.g. ``sglang 0.5.18``; goes into the sample."""
    template: str = ""
    """Digest of the chat template; goes into the sample."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Merged over the prompt's metadata in the sample."""
    partial: Sample | None = None
    """What an earlier step generated of this episode before it was cut off, to go on from; a
    function that ignores it begins anew."""
    served: set[int] = field(default_factory=set[int], compare=False)
    """Versions of the weights that answered this episode so far; the engine fills it."""

    @property
    def episode_id(self) -> str:
        """Name of this execution: ``{group_id}#{index}``."""
        return f"{self.group_id}#{self.index}"

    def sample(
        self,
        prompt: Prompt,
        prompt_text: str,
        prompt_ids: list[int],
        response_ids: list[int],
        response_text: str,
        logprobs: list[float],
        *,
        status: Status,
        finish_reason: str,
        loss_mask: list[bool] | None = None,
        policy_versions: list[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        cached_tokens: int = 0,
        generate_s: float = 0.0,
        routed_experts: bytes | None = None,
    ) -> Sample:
        """A sample of this episode with its identity and provenance filled in.

        Per-token arguments have one entry per response token. ``loss_mask`` is all True and
        ``policy_versions`` all the oldest that answered unless given. Where an episode yields several
        samples the collector numbers them on; they keep the episode's id. ``routed_experts`` are those
        of the last answer, where it had the whole sample but its own tokens for a request. Raises
        ValueError where lengths differ.
        """
        n = len(response_ids)
        return Sample(
            run=self.run,
            step=self.step,
            group_id=self.group_id,
            index=self.index,
            prompt_id=prompt.prompt_id,
            source_row=prompt.row,
            episode_id=self.episode_id,
            prompt_text=prompt_text,
            response_text=response_text,
            prompt_ids=list(prompt_ids),
            response_ids=list(response_ids),
            loss_mask=[True] * n if loss_mask is None else list(loss_mask),
            rollout_logprobs=list(logprobs),
            policy_versions=(
                [min(self.served, default=self.policy_version)] * n
                if policy_versions is None
                else list(policy_versions)
            ),
            status=status,
            finish_reason=finish_reason,
            label=prompt.label,
            metadata={**prompt.metadata, **self.metadata, **(metadata or {})},
            sampling=dict(self.sampling),
            seed=self.seed,
            engine=self.engine,
            template=self.template,
            generate_s=generate_s,
            cached_tokens=cached_tokens,
            routed_experts=routed_experts,
        )


GenerateFn = Callable[[GenerateEngine, Prompt, GenerateContext], Awaitable[Sample | list[Sample]]]
"""One episode: an ``async`` function that asks the engine as often as it likes."""
