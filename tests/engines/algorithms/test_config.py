"""The name of an algorithm gives the setting of its paper; what would do nothing is refused."""

import pytest
from pydantic import TypeAdapter, ValidationError

from rollflow.engines.algorithms.config import AlgorithmConfig

ALGORITHM = TypeAdapter(AlgorithmConfig)


def make(name, **fields):
    return ALGORITHM.validate_python({"name": name, **fields})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "grpo",
            {"advantage": "group", "loss": "clip", "eps_clip_high": 0.2, "reduction": "sequence"},
        ),
        ("dr_grpo", {"advantage": "group_mean", "reduction": "constant"}),
        ("dapo", {"eps_clip": 0.2, "eps_clip_high": 0.28, "reduction": "token", "kl_coef": 0}),
        ("gspo", {"loss": "sequence_clip", "eps_clip": 3e-4, "eps_clip_high": 4e-4}),
        ("cispo", {"loss": "cispo", "eps_clip": 1.0, "eps_clip_high": 4.0, "reduction": "token"}),
        ("rloo", {"advantage": "leave_one_out"}),
        (
            "reinforce_pp",
            {"advantage": "return", "whiten": True, "kl_in": "reward", "kl_type": "k1"},
        ),
        ("reinforce_pp_baseline", {"advantage": "group_mean", "whiten": True, "kl_type": "k2"}),
        ("ppo", {"advantage": "gae", "lam": 0.95, "gamma": 1.0, "kl_in": "reward"}),
        ("distill", {"advantage": "none", "teacher_coef": 1.0}),
        ("sft", {"reduction": "token"}),
    ],
)
def test_a_name_gives_the_vetted_setting_and_each_field_can_be_set_over_it(name, expected):
    config = make(name)
    assert {field: getattr(config, field) for field in expected} == expected
    assert make(name, reduction="episode").reduction == "episode"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grpo", {"gamma": 0.9}, "gamma = 0.9 has no effect with advantage = 'group'"),
        ("reinforce_pp", {"lam": 0.9}, "lam = 0.9 has no effect with advantage = 'return'"),
        (
            "grpo",
            {"kl_coef": 0.1, "kl_in": "reward"},
            "kl_in = 'reward' takes the KL from the rewards of single tokens",
        ),
        (
            "rloo",
            {"kl_coef": 0.1, "kl_in": "reward"},
            "kl_in = 'reward' takes the KL from the rewards of single tokens",
        ),
        ("grpo", {"kl_coef": 0.1, "kl_type": "k1"}, "no effect with kl_type = 'k1' in the loss"),
        ("grpo", {"kl_unbiased": True}, "kl_unbiased has no effect"),
        ("ppo", {"kl_unbiased": True}, "kl_unbiased has no effect"),
        ("cispo", {"dual_clip": 3.0}, "dual_clip has no effect with loss = 'cispo'"),
        ("grpo", {"constant_tokens": 8}, "constant_tokens has no effect"),
        ("grpo", {"critic": {}}, "'gae' needs one and nothing else uses it"),
        ("grpo", {"advantage": "gae"}, "'gae' needs one and nothing else uses it"),
        ("ppo", {"critic": None}, "'gae' needs one and nothing else uses it"),
        ("distill", {"teacher_coef": 0}, "there is nothing to learn from"),
        ("grpo", {"advantage": "grup"}, "advantage = 'grup' is none of group,"),
        ("grpo", {"loss": "ppo"}, "loss = 'ppo' is none of clip,"),
        ("grpo", {"correction": {"low": 2.0, "high": 1.0}}, "low = 2 is not below correction.high"),
        ("grpo", {"dual_clip": 1.0}, "greater than 1"),
        ("grpo", {"kl_in": "reward"}, "kl_in = 'reward' has no effect with kl_coef = 0"),
        ("grpo", {"kl_type": "k2"}, "kl_type = 'k2' has no effect with kl_coef = 0"),
        (
            "grpo",
            {"kl_coef": 0.1, "kl_type": "k2", "kl_unbiased": True},
            "kl_type = 'k2', whose gradient is unbiased without it",
        ),
        ("grpo", {"kl_coef": float("inf")}, "finite number"),
        (
            "grpo",
            {"loss": "my:fn", "eps_clip": 0.1},
            "eps_clip = 0.1 has no effect with loss = 'my:fn'",
        ),
        ("grpo", {"correction": {"high": 0.5}}, "leave out 1, the weight where both engines agree"),
        ("grpo", {"correction": {"low": 1.5}}, "leave out 1"),
        (
            "grpo",
            {"correction": {"mode": "reject", "high": float("inf")}},
            "correction.mode = 'reject' has no effect",
        ),
        ("dappo", {}, "does not match any of the expected tags"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(name, fields, message):
    with pytest.raises(ValidationError, match=message):
        make(name, **fields)
