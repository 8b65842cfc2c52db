"""Functions that a user brings: how they look, how they are found, how they are known afterwards.

A hook is named ``pkg.mod:fn``. A reward is as small as this::

    def contains(sample: Sample) -> float:
        return float(sample.label in sample.response_text)
"""

import hashlib
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, overload

from rollflow.storage.samples import Prompt, Sample, Status

HookKind = Literal["reward", "generate", "advantage", "loss"]

Reward = float | Mapping[str, float]
"""A score, or named scores of which ``reward`` is the one trained on and the rest are its parts."""

RewardFn = Callable[[Sample], Reward | Awaitable[Reward]]
"""Scores one sample. A plain function runs on a thread, an ``async`` one on the event loop."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine answered to one request."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token as it was sampled (nats)."""
    finish_reason: Literal["stop", "length", "abort"]
    policy_version: int
    cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache."""
    seconds: float = 0.0


class GenerateEngine(Protocol):
    """What a generate hook may ask of the rollout engine."""

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, through the chat template where the data settings ask for it."""
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
    ) -> Sample:
        """A sample of this episode with its identity and provenance filled in.

        Per-token arguments have one entry per response token. ``loss_mask`` is all True and
        ``policy_versions`` all the step's version unless given. Where an episode yields several
        samples the collector numbers them on; they keep the episode's id. Raises ValueError where
        lengths differ.
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
                [self.policy_version] * n if policy_versions is None else list(policy_versions)
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
        )


GenerateFn = Callable[[GenerateEngine, Prompt, GenerateContext], Awaitable[Sample | list[Sample]]]
"""One episode: an ``async`` function that asks the engine as often as it likes."""


@dataclass(frozen=True, slots=True)
class _Signature:
    arguments: tuple[str, ...]
    must_be_async: bool
    example: str


_SIGNATURES: dict[str, _Signature] = {
    "reward": _Signature(
        ("sample",),
        False,
        "def reward(sample: Sample) -> float | Mapping[str, float]  (or async def)",
    ),
    "generate": _Signature(
        ("engine", "prompt", "context"),
        True,
        "async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext)"
        " -> Sample | list[Sample]",
    ),
    "advantage": _Signature(
        ("outcomes",), False, "def advantage(outcomes: Outcomes) -> Tensor  (one per sample)"
    ),
    "loss": _Signature(
        ("inputs",), False, "def loss(inputs: LossInputs) -> Tensor  (one per token)"
    ),
}


@overload
def load_hook(path: str, kind: Literal["reward"]) -> RewardFn: ...
@overload
def load_hook(path: str, kind: Literal["generate"]) -> GenerateFn: ...
@overload
def load_hook(path: str, kind: Literal["advantage", "loss"]) -> Callable[[Any], Any]: ...
def load_hook(path: str, kind: HookKind) -> Callable[..., Any]:
    """Import the function named ``pkg.mod:fn`` and check that it can be called as a ``kind`` hook.

    Raises ValueError that says what is wrong and shows the signature that is expected.
    """
    hook = _find(path, kind)
    expected = _SIGNATURES[kind]
    if inspect.isclass(hook):
        raise _refusal(path, kind, "is a class; name a function, or an instance that is callable")
    if not callable(hook):
        raise _refusal(path, kind, f"is a {type(hook).__name__}, not a function")
    try:
        inspect.signature(hook).bind(*expected.arguments)
    except TypeError as error:
        names = ", ".join(expected.arguments)
        raise _refusal(path, kind, f"cannot be called with ({names}): {error}") from None
    if expected.must_be_async and not is_async(hook):
        raise _refusal(path, kind, "is not async; write it as 'async def'")
    return hook


def is_async(hook: Callable[..., Any]) -> bool:
    """Whether a hook is to be awaited on the event loop: an ``async def``, wrapped or an instance's."""
    unwrapped = inspect.unwrap(hook)
    return inspect.iscoroutinefunction(unwrapped) or inspect.iscoroutinefunction(
        getattr(unwrapped, "__call__", None)  # noqa: B004 - its kind is asked, not its presence
    )


def hook_version(path: str) -> str:
    """``pkg.mod:fn@<digest>``: the digest is of the whole file that defines the function.

    The whole file, because a grader changes when its neighbours do. Raises ValueError where the
    hook is not found or no file defines it.
    """
    hook = _find(path, "hook")
    module = inspect.getmodule(inspect.unwrap(hook)) if inspect.isroutine(hook) else None
    module = module or importlib.import_module(path.partition(":")[0])
    file = getattr(module, "__file__", None)
    if file is None:
        raise ValueError(
            f"hook {path!r} has no file to take its version from; define it in a module of your own"
        )
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return f"{path}@{digest[:12]}"


def parse_reward(result: object) -> tuple[float, dict[str, float]]:
    """What a reward hook returned, as (reward, named parts).

    Raises ValueError where it is neither a finite number nor a mapping of names to finite numbers
    with a key ``reward``.
    """
    if isinstance(result, Mapping):
        parts = {str(name): _finite(str(name), value) for name, value in result.items()}
        if "reward" not in parts:
            raise ValueError(
                f"reward function returned a mapping with keys {sorted(parts)}; "
                "it must have the key 'reward'"
            )
        return parts.pop("reward"), parts
    return _finite("reward", result), {}


def _finite(name: str, value: object) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward function returned {name} = {value!r}; return a finite number")
    return float(value)


def _find(path: str, kind: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise _refusal(path, kind, "is not of the form 'pkg.mod:fn'")
    module = _import(path, kind, module_name)
    if not hasattr(module, name):
        near = get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _refusal(path, kind, f"not found: {module_name} has no {name!r}{hint}")
    return getattr(module, name)


def _import(path: str, kind: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (ImportError, SyntaxError, TypeError) as error:
        raise _refusal(path, kind, f"cannot be imported: {error}") from error


def _refusal(path: str, kind: str, what: str) -> ValueError:
    expected = f"; expected {_SIGNATURES[kind].example}" if kind in _SIGNATURES else ""
    return ValueError(f"{kind} hook {path!r} {what}{expected}")
