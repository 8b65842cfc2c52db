"""``rollflow hooks check``: what a user reads about a function that does not fit."""

import asyncio
import time
from dataclasses import replace
from typing import get_args

import pytest

from rollflow.engines.hooks.check import TENSORS
from rollflow.engines.hooks.signatures import HookKind
from rollflow.tasks.hooks import check_hook

HERE = f"{__name__}"
NUMBER = 3


def takes_nothing():
    return 1.0


def reward_with_label(sample, label):
    return 1.0


def reward_of_none(sample):
    return None


def reward_that_raises(sample):
    return sample.answer


async def reward_that_waits(sample):
    await asyncio.sleep(60)


def reward_that_loops(sample):
    while True:
        pass


def one_reward(samples):
    return 1.0


async def generates_nothing(engine, prompt, context):
    return []


def generates_at_once(engine, prompt, context):
    return None


def filters_by_number(samples):
    return 0.5


def one_verdict(samples):
    return True


def no_sampling(prompt, step):
    return None


def high(kept):
    return "high"


def names_of(kept, step):
    return [k.group_id for k in kept]


def changes(kept, step):
    return [replace(k, step=step) for k in kept]


def negative(step, weights):
    return dict.fromkeys(weights, -1.0)


async def looks_later(samples, step):
    pass


def looks_without_step(samples):
    pass


def two_outcomes(outcomes, more):
    return outcomes


def one_advantage(outcomes):
    return outcomes.rewards_N[:1]


def infinite(inputs):
    return inputs.logprobs_T / 0


def policy_gradient(inputs):
    return -inputs.logprobs_T * inputs.advantages_T


def no_inputs():
    return 0.0


async def of_slime(args, sample):
    return float(args.n_samples_per_prompt)


async def of_slime_and_its_cluster(args, sample):
    return args.num_gpus_per_node


def of_trl(prompts, completions, difficulty):
    return [1.0 if d == "132" else 0.0 for d in difficulty]


def of_trl_without_list(prompts, completions):
    return 1.0


class Grader:
    def __call__(self, sample):
        return 1.0


grader = Grader()


def refusal(name: str, kind: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        check_hook(f"{HERE}:{name}", kind)
    return str(caught.value)


WRONG = [
    ("reward", "takes_nothing", "cannot be called with (sample): too many positional arguments"),
    ("reward", "reward_with_label", "missing a required argument: 'label'"),
    ("reward", "reward_of_none", "returned reward = None; return a finite number"),
    ("reward", "reward_that_raises", "has no attribute 'answer'\") (line 31 of "),
    ("group_reward", "one_reward", "gave 1.0 for 2 samples; give a list with a reward for each"),
    ("generate", "generates_nothing", "gave []; give a Sample or a list of them"),
    ("generate", "generates_at_once", "is not async; write it as 'async def'"),
    ("dynamic_filter", "filters_by_number", "gave 0.5; give True to keep the group, False or"),
    ("sample_filter", "one_verdict", "gave True for 2 samples; give a list of True or False"),
    ("sampling", "no_sampling", "gave None; give a mapping of names to values"),
    ("priority", "high", "gave 'high'; give a number"),
    ("buffer_filter", "names_of", "give a list of some of the entries that it was given"),
    ("buffer_filter", "changes", "that it was given, unchanged"),
    ("curriculum", "negative", "gave -1.0 as the share of 'train.jsonl'; give a number from 0 on"),
    ("batch_samples", "looks_later", "is async; write it as a plain 'def'"),
    ("eval_samples", "looks_without_step", "cannot be called with (samples, step)"),
    ("advantage", "one_advantage", "gave a tensor of shape (1,) for 5 samples; give one of (5,)"),
    ("loss", "infinite", "give finite numbers"),
    ("advantage", "two_outcomes", "missing a required argument: 'more'"),
    ("loss", "no_inputs", "cannot be called with (inputs)"),
]


def test_there_is_a_wrong_function_for_every_hook():
    assert {case[0] for case in WRONG} == set(get_args(HookKind))


@pytest.mark.parametrize(("kind", "name", "message"), WRONG)
def test_what_is_wrong_is_said_with_what_is_expected(kind: str, name: str, message: str):
    said = refusal(name, kind)
    assert message in said
    assert "expected" in said
    assert name in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "not found"),
        ("NUMBER", "is of type int, not a function"),
        ("Grader", "is a class; name a function, or an instance that is callable"),
    ],
)
def test_a_name_that_is_no_function_is_refused_once_and_not_for_every_hook(name: str, message: str):
    said = refusal(name)
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_function_that_fits_nothing_is_told_how_each_hook_looks():
    heading, *lines = refusal("takes_nothing").splitlines()
    assert "fits no hook" in heading
    assert [line.split(":")[0].strip() for line in lines] == [
        kind for kind in get_args(HookKind) if kind not in TENSORS
    ]


def test_a_function_named_after_one_hook_is_told_why_it_is_not_that():
    heading, line = refusal("reward_with_label").splitlines()
    assert "can be called as batch_samples, eval_samples" in heading
    assert line.startswith("  reward: cannot be called with (sample)")
    fits = check_hook(f"{HERE}:reward_with_label", "batch_samples")
    assert [verdict.kind for verdict in fits] == ["batch_samples"]


def test_a_loss_is_known_by_its_argument_and_tried():
    [verdict] = check_hook(f"{HERE}:policy_gradient")
    assert verdict.kind == "loss"
    assert "grad_fn" in verdict.gave


def test_an_instance_is_named_by_its_class():
    assert check_hook(f"{HERE}:grader", "reward")[0].called_as == "def Grader.__call__"


@pytest.mark.parametrize("name", ["reward_that_waits", "reward_that_loops"])
def test_a_function_that_does_not_end_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rollflow.engines.hooks.check.TIMEOUT_S", 0.2)
    started = time.monotonic()
    assert "gave nothing within 0.2 s" in refusal(name, "reward")
    assert time.monotonic() - started < 5


def test_a_function_of_slime_is_given_the_args_of_a_run():
    assert check_hook(f"{HERE}:of_slime", "reward")[0].gave == "8.0"
    said = refusal("of_slime_and_its_cluster", "reward")
    assert "args.num_gpus_per_node: rollflow gives slime functions only group_rm" in said


def test_a_function_of_trl_is_given_the_columns_that_it_asks_for():
    assert check_hook(f"{HERE}:of_trl", "reward")[0].gave == "1.0"
    assert "gives a list" in refusal("of_trl_without_list", "reward")


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    assert "no such hook; there are reward, group_reward" in refusal("reward_of_none", "rewrd")


@pytest.mark.parametrize(
    "name", ["exact_match:exact_match", "mathematics:boxed", "text:f1", "ifeval:strict"]
)
def test_rewards_that_come_with_rollflow_pass(name: str):
    assert check_hook(f"rollflow.engines.rewards.{name}", "reward")
