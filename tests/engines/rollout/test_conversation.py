"""Conversations as supervised samples: which tokens are learned, by several kinds of template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.hooks import GenerateContext
from rollflow.engines.rollout import supervised
from rollflow.engines.rollout.engine import RolloutEngine
from rollflow.storage.config import DataConfig
from rollflow.storage.samples import Message, Prompt, Sample

CONTEXT = GenerateContext("run", 0, "000000/p:0", 0, 9, {}, 4)
TALK: list[Message] = [
    {"role": "user", "content": "1+2="},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "3+4="},
    {"role": "assistant", "content": "7"},
]
# A turn ends with the end-of-turn token and a space, as ChatML's ends with a newline.
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={{ m['content'] }}{{ eos_token }} "
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
# Reasoning is kept only in the last turn, as Qwen3 has it.
THINKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}=1+1{{ '=2+2' if loop.last }}"
    "{{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
# No token ends a turn; the next one's beginning does, as in GLM-4.
UNENDED = (
    "{% for m in messages %}{{ '=' if m['role'] == 'assistant' else '+' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
COUNTS = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer(models: tuple[Path, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models[0])


async def learn(tokenizer: Any, template: str, messages: list[Message], **prompt: Any) -> Sample:
    tokenizer.chat_template = template
    engine = RolloutEngine(tokenizer, DataConfig(path="x", apply_chat_template=True), None)
    asked = replace(Prompt("p:0", 0, "p", messages), **prompt)
    sample = await supervised.generate(engine, asked, CONTEXT)
    assert isinstance(sample, Sample)
    return sample


def learned(tokenizer: Any, sample: Sample) -> list[str]:
    """Each run of trained tokens as text."""
    runs: list[list[int]] = []
    before = False
    for token, own in zip(sample.response_ids, sample.loss_mask, strict=True):
        if own:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = own
    return [tokenizer.decode(run).replace(" ", "") for run in runs]


def whole(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode(sample.prompt_ids + sample.response_ids).replace(" ", "")


async def test_every_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else(tokenizer: Any):
    sample = await learn(tokenizer, TURNS, TALK)
    eos = tokenizer.eos_token
    assert learned(tokenizer, sample) == [f"3{eos}", f"7{eos}"]
    assert whole(tokenizer, sample) == f"1+2==3{eos}3+4==7{eos}"
    assert sample.response_ids[-1] == tokenizer.eos_token_id
    assert sample.rollout_logprobs == [0.0] * len(sample.response_ids)


async def test_the_prompt_is_what_generation_would_have_been_given(tokenizer: Any):
    sample = await learn(tokenizer, TURNS, TALK)
    engine = RolloutEngine(tokenizer, DataConfig(path="x", apply_chat_template=True), None)
    assert sample.prompt_ids == engine.encode(Prompt("p:0", 0, "p", TALK[:1]))


async def test_a_turn_can_be_read_without_being_learned(tokenizer: Any):
    quiet = [TALK[0], {**TALK[1], "step_loss_mask": 0}, *TALK[2:]]
    sample = await learn(tokenizer, TURNS, quiet)
    assert learned(tokenizer, sample) == [f"7{tokenizer.eos_token}"]


async def test_a_template_that_drops_earlier_reasoning_is_followed(tokenizer: Any):
    sample = await learn(tokenizer, THINKS, TALK)
    eos = tokenizer.eos_token
    assert learned(tokenizer, sample) == [f"1+13{eos}", f"1+1=2+27{eos}"]


async def test_turns_that_no_token_ends_are_learned_to_the_next_ones_beginning(tokenizer: Any):
    sample = await learn(tokenizer, UNENDED, TALK)
    assert learned(tokenizer, sample) == ["3", "7"]


async def test_a_template_whose_beginning_depends_on_the_end_is_refused(tokenizer: Any):
    with pytest.raises(ValueError, match=r"p:0: message 1: the chat template renders"):
        await learn(tokenizer, COUNTS, TALK)


async def test_a_conversation_without_the_assistant_is_refused(tokenizer: Any):
    with pytest.raises(ValueError, match=r"p:0: no message to learn"):
        await learn(tokenizer, TURNS, TALK[:1])


async def test_a_label_goes_before_turns(tokenizer: Any):
    sample = await learn(tokenizer, TURNS, TALK[:1], label="3")
    assert learned(tokenizer, sample) == [f"3{tokenizer.eos_token}"]


async def test_tools_reach_the_template(tokenizer: Any):
    template = "{{ tools[0]['name'] if tools }}" + TURNS
    sample = await learn(tokenizer, template, TALK, metadata={"tools": [{"name": "9"}]})
    assert whole(tokenizer, sample).startswith("9")
