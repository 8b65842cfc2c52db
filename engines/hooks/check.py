"""The contract of each hook: an example goes in, and what comes out is of the right kind."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollflow.storage.buffer import Kept
from rollflow.storage.samples import Prompt, Sample, Status

from .load import load_hook, parse_reward
from .signatures import SIGNATURES, HookKind
from .types import Completion, GenerateContext

TIMEOUT_S = 30.0
PROMPT = Prompt("train.jsonl:7", 7, "train.jsonl", "47+85=", "132", {"tests": ["assert True"]})
KEPT = Kept("000002/train.jsonl:7", 2, "train.jsonl:7", 2, "cut")
CONTEXT = GenerateContext(
    "example", 3, "000003/train.jsonl:7", 0, 11, {"temperature": 1.0, "max_new_tokens": 8}, 3
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A function that fits a hook."""

    kind: HookKind
    called_as: str
    """The signature that it was recognised by."""
    gave: str
    """What it gave for the example, in short."""


def check_function(path: str, kind: HookKind) -> Verdict:
    """Load ``path`` as a ``kind`` hook and call it with an example.

    Raises ValueError that says what is wrong with its name, its signature or what it gives.
    """
    hook = load_hook(path, kind)
    if kind not in _EXAMPLES:
        return Verdict(kind, _signature(hook), "nothing: it is called with tensors, not tried here")
    arguments, judge = _EXAMPLES[kind]
    try:
        result = hook(*arguments())
        if inspect.isawaitable(result):
            result = asyncio.run(_bounded(result))
        judge(result)
    except Exception as error:
        expected = SIGNATURES[kind].example
        raise ValueError(f"{path} does not fit {kind}: {error!r}; expected {expected}") from error
    return Verdict(kind, _signature(hook), f"{result!r:.80}")


class _Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(i) for i in ids)


class ExampleEngine:
    """An engine whose model always says the same."""

    tokenizer = _Characters()

    def encode(self, prompt: Prompt) -> list[int]:
        return [ord(c) for c in str(prompt.prompt)]

    async def generate(
        self, input_ids: list[int], sampling: dict[str, Any], seed: int
    ) -> Completion:
        return Completion([ord(c) for c in "132"], [-0.1, -0.2, -0.3], "stop", 3)


def example_samples() -> list[Sample]:
    """A scored group of two: a right answer and a wrong one."""
    right = CONTEXT.sample(
        PROMPT, "47+85=", [52, 55], [49, 51, 50], "132", [-0.1, -0.2, -0.3],
        status=Status.COMPLETED, finish_reason="stop",
    )  # fmt: skip
    right = replace(right, reward=1.0)
    return [right, replace(right, index=1, response_text="131", reward=0.0)]


async def _bounded(result: Any) -> Any:
    return await asyncio.wait_for(result, TIMEOUT_S)


def _signature(hook: Callable[..., Any]) -> str:
    kind = "async def" if inspect.iscoroutinefunction(hook) else "def"
    return f"{kind} {getattr(hook, '__name__', type(hook).__name__)}"


def _reward(result: Any) -> None:
    parse_reward(result)


def _rewards(result: Any) -> None:
    rewards = [parse_reward(reward) for reward in result]
    if len(rewards) != 2:
        raise ValueError(f"gave {len(rewards)} rewards for 2 samples")


def _samples(result: Any) -> None:
    samples = result if isinstance(result, list) else [result]
    if not samples or not all(isinstance(s, Sample) for s in samples):
        raise TypeError(f"gave {result!r:.80}; give a Sample or a list of them")


def _verdict(result: Any) -> None:
    if not (isinstance(result, bool | str | tuple) or hasattr(result, "keep")):
        raise TypeError(f"gave {result!r:.80}; give True to keep the group, False or a reason")


def _mask(result: Any) -> None:
    if len(result) != 2 or not all(isinstance(verdict, bool) for verdict in result):
        raise ValueError(f"gave {result!r:.80} for 2 samples; give True or False for each")


def _mapping(result: Any) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(f"gave {result!r:.80}; give a mapping")


def _number(result: Any) -> None:
    float(result)


def _kept(result: Any) -> None:
    if not all(isinstance(kept, Kept) for kept in result):
        raise TypeError(f"gave {result!r:.80}; give some of the entries that it was given")


def _nothing(result: Any) -> None:
    """Whatever it gives is not looked at."""


_EXAMPLES: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[[Any], None]]] = {
    "reward": (lambda: (example_samples()[0],), _reward),
    "group_reward": (lambda: (example_samples(),), _rewards),
    "generate": (lambda: (ExampleEngine(), PROMPT, CONTEXT), _samples),
    "dynamic_filter": (lambda: (example_samples(),), _verdict),
    "sample_filter": (lambda: (example_samples(),), _mask),
    "sampling": (lambda: (PROMPT, 3), _mapping),
    "priority": (lambda: (KEPT,), _number),
    "buffer_filter": (lambda: ([KEPT], 3), _kept),
    "curriculum": (lambda: (3, {"train.jsonl": 1.0}), _mapping),
    "batch_samples": (lambda: (example_samples(), 3), _nothing),
    "eval_samples": (lambda: (example_samples(), 3), _nothing),
}
