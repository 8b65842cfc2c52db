"""The vocabulary of rollflow: what is asked, what was answered, and how to name it.

A *prompt* is one row of a dataset. A *sample* is one answer to it, token by token, with everything
that is needed to train on it, audit it or score it again. A *group* is all samples of one prompt in
one step. An *episode* is one execution that may yield several samples.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""One chat message: ``{"role": "user", "content": "2+2="}``."""

TEACHER_LOGPROBS = "teacher_logprobs"
"""Key in a sample's metadata: a teacher's log-probability of each response token (nats)."""


EXPERTS_DTYPE = "<u2"
"""Type of the numbers in ``Sample.routed_experts``, in numpy's words."""


class Status(StrEnum):
    """How a sample ended. ``FAILED`` is never a reward of 0: a failed sample has no reward."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt dataset, e.g. ``Prompt("train.jsonl:7", 7, "train.jsonl", "2+2=", "4")``."""

    prompt_id: str
    """Stable name: ``{file name}:{row}``, the row counted in the unsliced source."""
    row: int
    source: str
    """URL of the file that the row stands in."""
    prompt: str | list[Message]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one prompt. Per-token lists all have ``len(response_ids)`` entries."""

    # identity
    run: str
    step: int
    group_id: str
    """``{step:06d}/{prompt_id}`` unless a data source names groups itself."""
    index: int
    """Which of the group's samples this is, from 0."""
    prompt_id: str
    source_row: int
    episode_id: str
    """One execution of the generate function; siblings share it."""

    # text and tokens
    prompt_text: str
    response_text: str
    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[bool]
    """True where the token is the policy's own and is trained on."""
    rollout_logprobs: list[float]
    """Log-probability of each response token as the engine sampled it (nats); 0.0 where masked."""
    policy_versions: list[int]
    """Version of the weights that produced each response token."""

    # outcome
    status: Status
    finish_reason: str
    reward: float | None = None
    """None until scored, and for ever when ``status`` is failed."""
    reward_parts: dict[str, float] = field(default_factory=dict[str, float])
    grader: str = ""
    """``pkg.mod:fn@version`` of the reward function."""
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])

    # provenance
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    engine: str = ""
    """Engine and version that generated it, e.g. ``sglang 0.5.18``."""
    template: str = ""
    """Digest of the chat template that rendered the prompt; empty for plain text."""
    generate_s: float = 0.0
    score_s: float = 0.0
    cached_tokens: int = 0
    """Prompt tokens that the engine took from its prefix cache."""

    # of a sample that was scored again
    previous_reward: float | None = None
    """What the earlier grader gave, where there was one and it did."""
    previous_grader: str = ""
    """The earlier ``grader``; empty where the sample was scored once."""

    # of a model with a mixture of experts
    routed_experts: bytes | None = None
    """The experts that the servers sent each token to, ``EXPERTS_DTYPE`` [tokens - 1, layers, experts
    per token]: all tokens of prompt and response but the last, which nothing was computed from. None
    where that was not asked for."""

    @property
    def sample_id(self) -> str:
        """Name of the sample, unique in its run: ``{group_id}#{index}``."""
        return f"{self.group_id}#{self.index}"

    def __post_init__(self) -> None:
        n = len(self.response_ids)
        for name in ("loss_mask", "rollout_logprobs", "policy_versions"):
            if (m := len(getattr(self, name))) != n:
                raise ValueError(
                    f"sample {self.sample_id}: {name} has {m} entries for {n} response tokens; "
                    "give one entry per response token"
                )
        if self.routed_experts and len(self.routed_experts) % (
            size := 2 * max(len(self.prompt_ids) + n - 1, 1)
        ):
            raise ValueError(
                f"sample {self.sample_id}: routed_experts has {len(self.routed_experts)} bytes, no "
                f"multiple of {size}: two for each layer and expert of all tokens but the last"
            )
        if self.status is Status.FAILED and self.reward is not None:
            raise ValueError(
                f"sample {self.sample_id}: status is failed but reward is {self.reward}; "
                "a failed sample has no reward"
            )
