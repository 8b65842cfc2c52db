"""What each kind of hook is called with."""

from dataclasses import dataclass
from typing import Literal

HookKind = Literal[
    "reward",
    "group_reward",
    "generate",
    "dynamic_filter",
    "sample_filter",
    "sampling",
    "priority",
    "buffer_filter",
    "curriculum",
    "batch_samples",
    "eval_samples",
    "advantage",
    "loss",
]


@dataclass(frozen=True, slots=True)
class Signature:
    """How a hook must be callable."""

    arguments: tuple[str, ...]
    example: str
    must_be_async: bool = False
    may_be_async: bool = False


SIGNATURES: dict[str, Signature] = {
    "reward": Signature(
        ("sample",),
        "def reward(sample: Sample) -> float | Mapping[str, float]  (or async def)",
        may_be_async=True,
    ),
    "group_reward": Signature(
        ("samples",),
        "def reward(samples: list[Sample]) -> list[float | Mapping[str, float]]  (or async def)",
        may_be_async=True,
    ),
    "generate": Signature(
        ("engine", "prompt", "context"),
        "async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext)"
        " -> Sample | list[Sample]",
        must_be_async=True,
        may_be_async=True,
    ),
    "dynamic_filter": Signature(
        ("samples",), "def keep(samples: list[Sample]) -> bool | str | tuple[bool, str]"
    ),
    "sample_filter": Signature(("samples",), "def trained_on(samples: list[Sample]) -> list[bool]"),
    "sampling": Signature(
        ("prompt", "step"), "def sampling(prompt: Prompt, step: int) -> Mapping[str, Any]"
    ),
    "priority": Signature(("kept",), "def priority(kept: Kept) -> float"),
    "buffer_filter": Signature(
        ("kept", "step"), "def may_draw(kept: list[Kept], step: int) -> list[Kept]"
    ),
    "curriculum": Signature(
        ("step", "weights"),
        "def curriculum(step: int, weights: dict[str, float]) -> Mapping[str, float]",
    ),
    "batch_samples": Signature(
        ("samples", "step"), "def look(samples: list[Sample], step: int) -> None"
    ),
    "eval_samples": Signature(
        ("samples", "step"), "def look(samples: list[Sample], step: int) -> None"
    ),
    "advantage": Signature(
        ("outcomes",), "def advantage(outcomes: Outcomes) -> Tensor  (one per sample)"
    ),
    "loss": Signature(("inputs",), "def loss(inputs: LossInputs) -> Tensor  (one per token)"),
}

SETTINGS: dict[str, str] = {
    "reward": "rollout.reward, evals.reward",
    "group_reward": "rollout.reward with rollout.group_reward = true",
    "generate": "rollout.generate, evals.generate",
    "dynamic_filter": "hooks.dynamic_filter",
    "sample_filter": "hooks.sample_filter",
    "sampling": "hooks.sampling",
    "priority": "rollout.buffer.priority",
    "buffer_filter": "hooks.buffer_filter",
    "curriculum": "hooks.curriculum",
    "batch_samples": "hooks.batch_samples",
    "eval_samples": "hooks.eval_samples",
    "advantage": "algorithm.advantage",
    "loss": "algorithm.loss",
}
"""Where each kind is named."""
