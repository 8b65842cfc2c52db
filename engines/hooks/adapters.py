"""Functions written for slime, TRL or verl, called unchanged: known by the names of their arguments."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollflow.storage.kept import Kept
from rollflow.storage.samples import Message, Prompt, Sample

from .signatures import HookKind
from .slime import SlimeSample, arguments
from .types import GenerateContext, GenerateEngine

Hook = Callable[..., Any]


def adapted(hook: Hook, kind: HookKind) -> Hook | None:
    """``hook`` as a hook of our own, where it has a signature of slime, TRL or verl; else None."""
    names = _names(hook)
    found: Callable[[Hook], Hook] | None = None
    if kind in ("reward", "group_reward") and "completions" in names:
        found = _trl_reward if kind == "reward" else _trl_group_reward
    elif kind == "reward" and {"solution_str", "ground_truth"} <= names:
        found = _verl_reward
    elif "args" in names:
        found = _SLIME.get(kind)
    return None if found is None else found(hook)


def columns_asked(hook: Hook) -> list[str]:
    """Columns of the data that a function with TRL's signature asks for by name."""
    if "completions" not in _names(hook):
        return []
    required = [
        name
        for name, p in inspect.signature(hook).parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return [name for name in required if name not in _TRL_GIVEN]


_TRL_GIVEN = (
    "prompts", "completions", "completion_ids", "label", "answer", "solution", "ground_truth",
)  # fmt: skip


def _names(hook: Hook) -> set[str]:
    try:
        return set(inspect.signature(hook).parameters)
    except (TypeError, ValueError):
        return set()


def _trl_reward(hook: Hook) -> Hook:
    """``f(prompts, completions, **columns) -> list[float | None]``, given one sample at a time."""
    group = _trl_group_reward(hook)
    if inspect.iscoroutinefunction(inspect.unwrap(hook)):

        @_stands_for(hook)
        async def later(sample: Sample) -> Any:
            return _only(await group([sample]))

        return later

    @_stands_for(hook)
    def reward(sample: Sample) -> Any:
        return _only(group([sample]))

    return reward


def _only(rewards: Any) -> Any:
    """TypeError where a function of TRL's gave no list."""
    if not isinstance(rewards, Sequence) or isinstance(rewards, str) or len(rewards) != 1:
        raise TypeError(
            f"gave {rewards!r:.80} for 1 completion; a function with TRL's signature gives a list, a "
            "number for each"
        )
    return rewards[0]


def _trl_group_reward(hook: Hook) -> Hook:
    parameters = inspect.signature(hook).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def call(samples: list[Sample]) -> Any:
        columns: dict[str, list[Any]] = {
            "prompts": [_trl_prompt(s) for s in samples],
            "completions": [_trl_completion(s) for s in samples],
            "completion_ids": [s.response_ids for s in samples],
            "label": [s.label for s in samples],
        }
        for name in {name for s in samples for name in s.metadata}:
            columns.setdefault(name, [s.metadata.get(name) for s in samples])
        for name in ("answer", "solution", "ground_truth"):
            columns.setdefault(name, columns["label"])
        return hook(**{k: v for k, v in columns.items() if takes_all or k in parameters})

    if inspect.iscoroutinefunction(inspect.unwrap(hook)):

        @_stands_for(hook)
        async def later(samples: list[Sample]) -> Any:
            return await call(samples)

        return later

    @_stands_for(hook)
    def rewards(samples: list[Sample]) -> Any:
        return call(samples)

    return rewards


def _trl_prompt(sample: Sample) -> str | list[Message]:
    return sample.metadata.get("messages", sample.prompt_text)


def _trl_completion(sample: Sample) -> str | list[Message]:
    if "messages" in sample.metadata:
        return [{"role": "assistant", "content": sample.response_text}]
    return sample.response_text


def _verl_reward(hook: Hook) -> Hook:
    """``compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict``."""

    @_stands_for(hook)
    def reward(sample: Sample) -> Any:
        reward_model = sample.metadata.get("reward_model", {})
        result = hook(
            data_source=sample.metadata.get("data_source", sample.prompt_id.rpartition(":")[0]),
            solution_str=sample.response_text,
            ground_truth=reward_model.get("ground_truth", sample.label),
            extra_info=sample.metadata.get("extra_info", dict(sample.metadata)),
        )
        return _named_reward(result, "score")

    return reward


def _slime_reward(hook: Hook) -> Hook:
    @_stands_for(hook)
    async def reward(sample: Sample) -> Any:
        result = await _awaited(hook(arguments(), SlimeSample.of(sample)))
        return _named_reward(result, getattr(arguments(), "reward_key", "") or "score")

    return reward


def _slime_group_reward(hook: Hook) -> Hook:
    @_stands_for(hook)
    async def rewards(samples: list[Sample]) -> Any:
        results = await _awaited(hook(arguments(), [SlimeSample.of(s) for s in samples]))
        key = getattr(arguments(), "reward_key", "") or "score"
        return [_named_reward(result, key) for result in results]

    return rewards


def _slime_generate(hook: Hook) -> Hook:
    """``async fn(args, sample, sampling_params) -> Sample``, which asks the router by itself."""

    @_stands_for(hook)
    async def generate(
        engine: GenerateEngine, prompt: Prompt, context: GenerateContext
    ) -> Sample | list[Sample]:
        ids = engine.encode(prompt)
        theirs = SlimeSample.begin(prompt, context, ids, engine.tokenizer.decode(ids))
        sampling = {**context.sampling, "sampling_seed": context.seed}
        answer = await hook(arguments(), theirs, sampling)
        many = answer if isinstance(answer, list) else [answer]
        samples = [one.to_sample(prompt, context) for one in many]
        return samples if isinstance(answer, list) else samples[0]

    return generate


def _slime_dynamic_filter(hook: Hook) -> Hook:
    @_stands_for(hook)
    def keep(samples: list[Sample]) -> Any:
        return hook(arguments(), [SlimeSample.of(s) for s in samples])

    return keep


def _slime_sample_filter(hook: Hook) -> Hook:
    """``fn(args, samples) -> None``, which sets ``remove_sample``."""

    @_stands_for(hook)
    def trained_on(samples: list[Sample]) -> list[bool]:
        theirs = [SlimeSample.of(s) for s in samples]
        hook(arguments(), theirs)
        return [not one.remove_sample for one in theirs]

    return trained_on


def _slime_buffer_filter(hook: Hook) -> Hook:
    """``fn(args, rollout_id, buffer, num_samples)``, which takes groups out of ``buffer``."""

    @_stands_for(hook)
    def may_draw(kept: list[Kept], step: int) -> list[Kept]:
        return list(hook(arguments(), step, list(kept), len(kept)))

    return may_draw


def _slime_look(hook: Hook) -> Hook:
    @_stands_for(hook)
    def look(samples: list[Sample], step: int) -> None:
        theirs = [SlimeSample.of(s) for s in samples]
        names = list(inspect.signature(hook).parameters)
        if "rollout_id" in names:
            hook(step, arguments(), theirs, {}, 0.0)
        else:
            hook(arguments(), theirs, *([None] if "data_source" in names else []))

    return look


_SLIME: dict[str, Callable[[Hook], Hook]] = {
    "reward": _slime_reward,
    "group_reward": _slime_group_reward,
    "generate": _slime_generate,
    "dynamic_filter": _slime_dynamic_filter,
    "sample_filter": _slime_sample_filter,
    "buffer_filter": _slime_buffer_filter,
    "batch_samples": _slime_look,
    "eval_samples": _slime_look,
}


def _named_reward(result: Any, key: str) -> Any:
    """A mapping's main number is called ``reward`` here, and ``key`` there."""
    if isinstance(result, Mapping) and "reward" not in result and key in result:
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        return {"reward": result[key], **{k: v for k, v in numbers.items() if k != key}}
    return result


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def _stands_for(hook: Hook) -> Callable[[Hook], Hook]:
    """Name the wrapper after the function that it calls; its file is what a version is taken of."""

    def mark(wrapper: Hook) -> Hook:
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(hook, name):
                setattr(wrapper, name, getattr(hook, name))
        return wrapper

    return mark
