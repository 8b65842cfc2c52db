"""The contract of each hook: an example goes in, and what comes out is of the right kind."""

import asyncio
import inspect
import math
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

from rollflow.storage.kept import Kept
from rollflow.storage.samples import Message, Prompt, Sample, Status

from .adapters import columns_asked
from .load import find_hook, is_async, load_hook, parse_reward
from .signatures import SIGNATURES, HookKind
from .types import Completion, GenerateContext

TIMEOUT_S = 30.0
COLUMNS = {
    "tests": ["assert True"],
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
"""What the rewards that come with rollflow look for in the data."""
TENSORS = ("advantage", "loss")
"""Hooks that are called with tensors: tried only where they are meant, for PyTorch is slow to import."""
OTHERS = {"args", "completions", "solution_str"}
"""Arguments by which functions of slime, TRL and verl are known."""
PROMPT = Prompt("train.jsonl:7", 7, "train.jsonl", "47+85=", "132", COLUMNS)
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
    arguments, judge = _EXAMPLES[kind]
    columns = columns_asked(find_hook(path, kind))
    try:
        with _deadline():
            result = hook(*_with_columns(arguments(), columns))
            if inspect.isawaitable(result):
                result = asyncio.run(_bounded(result))
    except TimeoutError:
        raise _misfit(path, kind, f"gave nothing within {TIMEOUT_S:g} s") from None
    except Exception as error:
        raise _misfit(path, kind, f"raised {error!r}{_place(error)}") from error
    try:
        judge(result)
    except (TypeError, ValueError) as error:
        raise _misfit(path, kind, str(error)) from error
    return Verdict(kind, _signature(hook), f"{result!r:.80}")


def check_any(path: str) -> list[Verdict]:
    """Find out which hooks the function named ``path`` can be.

    One whose arguments are named after a hook that it does not fit is refused, whatever else it
    fits. Raises ValueError where it fits none, with what is wrong for each.
    """
    meant = _named_after(find_hook(path))
    found: list[Verdict] = []
    refused: dict[str, str] = {}
    kinds = [k for k in SIGNATURES if k in meant or k not in TENSORS]
    for name in cast(list[HookKind], kinds):
        try:
            found.append(check_function(path, name))
        except ValueError as error:
            why = str(error).removeprefix(f"{name} hook {path!r} ").removeprefix(f"{path}, ")
            refused[name] = f"  {name}: {why}"
    if found and not (meant and meant <= refused.keys()):
        return found
    lines = [line for name, line in refused.items() if not meant or name in meant]
    raise ValueError("\n".join([_heading(path, [v.kind for v in found]), *lines]))


def _named_after(hook: Callable[..., Any]) -> set[str]:
    """The hooks of which the function's arguments have most names; none for those of others."""
    names = set(inspect.signature(hook).parameters)
    shared = {kind: len(names & set(s.arguments)) for kind, s in SIGNATURES.items()}
    most = max(shared.values())
    if not most or names & OTHERS:
        return set()
    return {kind for kind, count in shared.items() if count == most}


def _heading(path: str, fits: list[HookKind]) -> str:
    if not fits:
        return f"{path} fits no hook; 'rollflow hooks ls' shows how each looks"
    return (
        f"{path} can be called as {', '.join(fits)}, but its arguments are named as another hook's; "
        "give --kind where that is meant"
    )


def _misfit(path: str, kind: HookKind, what: str) -> ValueError:
    return ValueError(
        f"{path}, called with an example, {what}; expected {SIGNATURES[kind].example}"
    )


def _place(error: Exception) -> str:
    """Where the function raised; empty where it was not entered."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/engines/hooks/" not in f[0]]
    return f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


@contextmanager
def _deadline() -> Iterator[None]:
    """TimeoutError in what runs too long, even where it never gives control back."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _with_columns(arguments: tuple[Any, ...], columns: Sequence[str]) -> tuple[Any, ...]:
    """The example, with a column of the data for each that a function of TRL asks for by name."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        if isinstance(value, Sample):
            return replace(value, metadata=dict.fromkeys(columns, value.label) | value.metadata)
        return value

    return tuple(filled(value) for value in arguments) if columns else arguments


class _Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(i) for i in ids)


class ExampleEngine:
    """An engine whose model always says the same."""

    tokenizer = _Characters()
    judge_url = "http://127.0.0.1:9"
    """Nobody answers there."""

    def encode(self, prompt: Prompt) -> list[int]:
        return [ord(c) for c in str(prompt.prompt)]

    def render(
        self, prompt: Prompt, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)

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
    kind = "async def" if is_async(hook) else "def"
    return f"{kind} {getattr(hook, '__name__', f'{type(hook).__name__}.__call__')}"


def _reward(result: Any) -> None:
    parse_reward(result)


def _rewards(result: Any) -> None:
    rewards = _items(result)
    if len(rewards) != 2:
        raise TypeError(f"gave {result!r:.80} for 2 samples; give a list with a reward for each")
    for reward in rewards:
        parse_reward(reward)


def _samples(result: Any) -> None:
    samples = result if isinstance(result, list) else [result]
    if not samples or not all(isinstance(s, Sample) for s in samples):
        raise TypeError(f"gave {result!r:.80}; give a Sample or a list of them")


def _verdict(result: Any) -> None:
    if not (isinstance(result, bool | str | tuple) or hasattr(result, "keep")):
        raise TypeError(f"gave {result!r:.80}; give True to keep the group, False or a reason")


def _mask(result: Any) -> None:
    verdicts = _items(result)
    if len(verdicts) != 2 or not all(isinstance(verdict, bool) for verdict in verdicts):
        raise TypeError(f"gave {result!r:.80} for 2 samples; give a list of True or False for each")


def _mapping(result: Any) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(f"gave {result!r:.80}; give a mapping of names to values")


def _shares(result: Any) -> None:
    _mapping(result)
    for name, share in result.items():
        if not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise TypeError(f"gave {share!r} as the share of {name!r}; give a number from 0 on")


def _number(result: Any) -> None:
    if not isinstance(result, Real) or math.isnan(result):
        raise TypeError(f"gave {result!r:.80}; give a number")


def _kept(result: Any) -> None:
    is_list = isinstance(result, Iterable) and not isinstance(result, str)
    if not is_list or not all(kept == KEPT for kept in _items(result)):
        raise TypeError(
            f"gave {result!r:.120}; give a list of some of the entries that it was given, unchanged"
        )


def _items(result: Any) -> list[Any]:
    """What a list holds, or anything like a list; empty where it is none."""
    is_list = isinstance(result, Iterable) and not isinstance(result, str | Mapping)
    return list(result) if is_list else []


def example_outcomes() -> Any:
    """Five scored samples in two groups; in one two samples are of one episode."""
    import torch

    from rollflow.engines.algorithms.inputs import Outcomes

    rewards_N = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    return Outcomes(rewards_N, ["a", "a", "a", "b", "b"], ["1", "2", "2", "3", "4"])


def example_losses() -> Any:
    """Trained tokens of two samples, of three and of two tokens."""
    import torch

    from rollflow.engines.algorithms.inputs import LossInputs

    old_T = torch.tensor([-0.5, -1.0, -2.0, -0.1, -3.0])
    return LossInputs(
        logprobs_T=(old_T + 0.1).requires_grad_(),
        weights_T=torch.full((5,), 0.2),
        entropy_T=torch.ones(5),
        advantages_T=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]),
        old_logprobs_T=old_T,
        ref_logprobs_T=old_T - 0.1,
        rollout_logprobs_T=old_T + 0.01,
        segments_T=torch.tensor([0, 0, 0, 1, 1]),
    )


def _tensor(result: Any, each: str) -> None:
    import torch

    if not isinstance(result, torch.Tensor):
        raise TypeError(f"gave {result!r:.80}; give a tensor")
    if result.shape != (5,):
        raise TypeError(
            f"gave a tensor of shape {tuple(result.shape)} for 5 {each}; give one of (5,)"
        )
    if not bool(torch.isfinite(result).all()):
        raise TypeError(f"gave {result.tolist()}; give finite numbers")


def _losses(result: Any) -> None:
    _tensor(result, "tokens")
    if not result.requires_grad:
        raise TypeError(
            "gave a tensor without a gradient; compute it from inputs.logprobs_T, without detach()"
        )


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
    "curriculum": (lambda: (3, {"train.jsonl": 1.0}), _shares),
    "batch_samples": (lambda: (example_samples(), 3), _nothing),
    "eval_samples": (lambda: (example_samples(), 3), _nothing),
    "advantage": (lambda: (example_outcomes(),), lambda result: _tensor(result, "samples")),
    "loss": (lambda: (example_losses(),), _losses),
}
