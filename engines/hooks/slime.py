"""What a function written for slime is given: its ``args`` and its ``Sample``, under slime's names."""

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

from rollflow.storage.samples import Prompt, Sample, Status

from .types import GenerateContext


class _Arguments(SimpleNamespace):
    """The settings that have a counterpart in slime."""

    def __getattr__(self, name: str) -> Any:
        known = ", ".join(sorted(vars(self)))
        raise AttributeError(f"args.{name}: rollflow gives slime functions only {known}")


_arguments = _Arguments()


def set_arguments(values: dict[str, Any]) -> None:
    """Fill in what :func:`arguments` gives; done once, before any hook is called."""
    vars(_arguments).update(values)


def arguments() -> Any:
    """slime's ``args``."""
    return _arguments


class _Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class SlimeSample:
    """A sample with slime's attributes; a generate function fills it and gives it back."""

    group_index: int | None = None
    index: int | None = None
    prompt: Any = ""
    tokens: list[int] = field(default_factory=list[int])
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Any = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list[str])
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Any = _Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    session_id: str | None = None

    Status = _Status
    """slime names the states ``Sample.Status.COMPLETED`` and so on."""

    @classmethod
    def of(cls, sample: Sample) -> "SlimeSample":
        """A sample of ours, as slime would have it."""
        return cls(
            index=sample.index,
            prompt=sample.prompt_text,
            tokens=[*sample.prompt_ids, *sample.response_ids],
            response=sample.response_text,
            response_length=len(sample.response_ids),
            label=sample.label,
            reward=sample.reward,
            loss_mask=[int(m) for m in sample.loss_mask],
            weight_versions=[str(v) for v in sorted(set(sample.policy_versions))],
            rollout_log_probs=list(sample.rollout_logprobs),
            status=_Status(sample.status.value),
            metadata=dict(sample.metadata),
            session_id=sample.episode_id,
        )

    @classmethod
    def begin(
        cls, prompt: Prompt, context: GenerateContext, prompt_ids: list[int], text: str
    ) -> "SlimeSample":
        """What a generate function starts from."""
        return cls(
            index=context.index,
            prompt=text,
            tokens=list(prompt_ids),
            label=prompt.label,
            metadata=dict(prompt.metadata),
            session_id=context.episode_id,
        )

    def to_sample(self, prompt: Prompt, context: GenerateContext) -> Sample:
        """What a generate function filled in, as a sample of ours.

        Raises ValueError where log-probabilities are missing or lengths do not agree.
        """
        n = self.response_length
        if self.rollout_log_probs is None or len(self.rollout_log_probs) != n:
            found = "none" if self.rollout_log_probs is None else len(self.rollout_log_probs)
            raise ValueError(
                f"sample.rollout_log_probs: {found} for response_length = {n}; ask the router with "
                '"return_logprob": true and keep one for each response token'
            )
        split = len(self.tokens) - n
        mask = self.loss_mask if self.loss_mask is not None else [1] * n
        versions = [int(v) for v in self.weight_versions]
        return context.sample(
            prompt,
            str(self.prompt),
            self.tokens[:split],
            self.tokens[split:],
            self.response,
            list(self.rollout_log_probs),
            loss_mask=[bool(m) for m in mask],
            status=Status(self.status.value if isinstance(self.status, Enum) else self.status),
            finish_reason=str(getattr(self.status, "value", self.status)),
            policy_versions=[min(versions)] * n if versions else None,
            metadata={k: v for k, v in self.metadata.items() if k not in prompt.metadata},
        )
