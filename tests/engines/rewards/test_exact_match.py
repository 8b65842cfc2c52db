import pytest

from rollflow.engines.hooks import load_hook
from rollflow.engines.rewards.exact_match import exact_match
from rollflow.storage.samples import Sample, Status


def answer(text, label):
    return Sample(
        run="r",
        step=0,
        group_id="000000/a:0",
        index=3,
        prompt_id="a:0",
        source_row=0,
        episode_id="000000/a:0#3",
        prompt_text="2+2=",
        response_text=text,
        prompt_ids=[1],
        response_ids=[2],
        loss_mask=[True],
        rollout_logprobs=[-0.1],
        policy_versions=[0],
        status=Status.COMPLETED,
        finish_reason="stop",
        label=label,
    )


@pytest.mark.parametrize(
    ("text", "label", "reward"),
    [("4", "4", 1.0), (" 4\n", "4", 1.0), ("4", " 4", 1.0), ("44", "4", 0.0), ("", "4", 0.0)],
)
def test_only_the_label_itself_is_rewarded_white_space_aside(text, label, reward):
    assert exact_match(answer(text, label)) == reward


def test_a_sample_without_a_label_is_refused_by_name():
    with pytest.raises(ValueError, match="000000/a:0#3: label is None"):
        exact_match(answer("4", None))


def test_it_loads_as_a_reward_hook():
    assert load_hook("rollflow.engines.rewards.exact_match:exact_match", "reward") is exact_match
