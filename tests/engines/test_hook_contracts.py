"""The contract of every hook, and functions of slime, TRL and verl that run unchanged."""

import asyncio
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from rollflow.engines.hooks import load_hook, set_arguments
from rollflow.engines.hooks.check import (
    CONTEXT,
    PROMPT,
    ExampleEngine,
    check_function,
    example_samples,
)
from rollflow.engines.hooks.signatures import SETTINGS, SIGNATURES, HookKind

HERE = f"{__name__}"


def reward(sample):
    return {"reward": float(sample.response_text == sample.label), "short": 1.0}


def group_reward(samples):
    best = max(len(s.response_text) for s in samples)
    return [len(s.response_text) / best for s in samples]


async def generate(engine, prompt, context):
    ids = engine.encode(prompt)
    answer = await engine.generate(ids, context.sampling, context.seed)
    text = engine.tokenizer.decode(answer.token_ids)
    return context.sample(
        prompt, str(prompt.prompt), ids, answer.token_ids, text, answer.logprobs,
        status="completed", finish_reason="stop",
    )  # fmt: skip


def dynamic_filter(samples):
    return len({s.reward for s in samples}) > 1, "all rewards are equal"


def sample_filter(samples):
    return [s.reward is not None for s in samples]


def sampling(prompt, step):
    return {"temperature": 1.0 if step < 100 else 0.7}


def priority(kept):
    return kept.step


def buffer_filter(kept, step):
    return [k for k in kept if k.step >= step - 1]


def curriculum(step, weights):
    return {name: weight * (1 + step) for name, weight in weights.items()}


def batch_samples(samples, step):
    print(step, len(samples))


def eval_samples(samples, step):
    print(step, len(samples))


def advantage(outcomes):
    return outcomes.rewards_N - outcomes.rewards_N.mean()


def loss(inputs):
    return -inputs.logprobs_T * inputs.advantages_T


# As they stand in projects that use slime, TRL and verl.


async def slime_rm(args, sample, **kwargs):
    if sample.status == sample.Status.TRUNCATED:
        return 0.0
    assert args.n_samples_per_prompt == 8
    return 1.0 if sample.response.strip() == sample.label else 0.0


async def slime_generate(args, sample, sampling_params):
    new = [49, 51, 50][: sampling_params["max_new_tokens"]]
    sample.tokens = sample.tokens + new
    sample.response = "132"
    sample.response_length = len(new)
    sample.rollout_log_probs = [-0.1] * len(new)
    sample.loss_mask = [1] * len(new)
    sample.status = sample.Status.COMPLETED
    return sample


@dataclass
class DynamicFilterOutput:
    keep: bool
    reason: str | None = None


def slime_filter(args, samples, **kwargs):
    rewards = [sample.reward for sample in samples]
    return DynamicFilterOutput(keep=len(set(rewards)) > 1, reason="zero_std")


def slime_sample_filter(args, samples):
    for sample in samples:
        sample.remove_sample = sample.reward == 0.0


def slime_buffer_filter(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]


def trl_reward(prompts, completions, label, **kwargs):
    return [1.0 if c == right else 0.0 for c, right in zip(completions, label, strict=True)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 1.0}


@pytest.mark.parametrize("kind", get_args(HookKind))
def test_a_function_for_each_hook_passes_its_contract(kind: HookKind):
    assert check_function(f"{HERE}:{kind}", kind).kind == kind
    assert kind in SETTINGS


@pytest.mark.parametrize("kind", [k for k in SIGNATURES if k != "reward"])
def test_a_function_with_another_signature_is_told_the_right_one(kind: HookKind):
    with pytest.raises(ValueError, match="expected"):
        check_function(f"{HERE}:wrong", kind)


def wrong(a, b, c, d, e):
    return None


@pytest.fixture
def arguments():
    set_arguments({"n_samples_per_prompt": 8, "reward_key": ""})


@pytest.mark.parametrize("name", ["slime_rm", "trl_reward", "compute_score"])
def test_rewards_of_slime_trl_and_verl_run_unchanged(arguments: None, name: str):
    function: Any = load_hook(f"{HERE}:{name}", "reward")

    def call(sample: Any) -> Any:
        result = function(sample)
        result = asyncio.run(result) if asyncio.iscoroutine(result) else result
        return result["reward"] if isinstance(result, dict) else result

    right, other = example_samples()
    assert (call(right), call(other)) == (1.0, 0.0)


async def test_a_generate_function_of_slime_runs_unchanged(arguments: None):
    function: Any = load_hook(f"{HERE}:slime_generate", "generate")
    sample = await function(ExampleEngine(), PROMPT, CONTEXT)
    assert (sample.prompt_ids, sample.response_ids) == ([ord(c) for c in "47+85="], [49, 51, 50])
    assert (sample.group_id, sample.seed, sample.policy_versions) == (CONTEXT.group_id, 11, [3] * 3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("slime_filter", "dynamic_filter"),
        ("slime_sample_filter", "sample_filter"),
        ("slime_buffer_filter", "buffer_filter"),
        ("trl_reward", "group_reward"),
    ],
)
def test_other_functions_of_slime_and_trl_pass_the_contract(
    arguments: None, name: str, kind: HookKind
):
    check_function(f"{HERE}:{name}", kind)


def test_what_slime_functions_ask_of_args_and_cannot_have_is_named(arguments: None):
    from rollflow.engines.hooks.slime import arguments as args

    with pytest.raises(AttributeError, match=r"num_gpus_per_node.*n_samples_per_prompt"):
        args().num_gpus_per_node  # noqa: B018
