"""Encoding prompts, the two generate functions that come with rollflow, and seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.hooks import Completion, GenerateContext
from rollflow.engines.rollout import single_turn, supervised
from rollflow.engines.rollout.engine import RolloutEngine
from rollflow.engines.rollout.seeds import sample_seed
from rollflow.storage.config import DataConfig
from rollflow.storage.samples import Prompt, Status

PROMPT = Prompt("p:0", 0, "p", "1+2=", "3")
CONTEXT = GenerateContext("run", 0, "000000/p:0", 1, 9, {"temperature": 1.0}, 4)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}={% endfor %}{% if more %} {% endif %}"


@pytest.fixture
def tokenizer(models: tuple[Path, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models[0])


class AnswersOnce:
    """A client that knows one completion."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.asked: list[Any] = []

    async def generate(
        self, *request: Any, routed_experts: bool = False, together: bool = False
    ) -> Completion:
        self.asked.append(request)
        return self.completion


def engine(tokenizer: Any, client: Any = None, **data: Any) -> RolloutEngine:
    return RolloutEngine(tokenizer, DataConfig(path="x", **data), client)


def test_text_is_encoded_as_it_stands(tokenizer: Any):
    assert engine(tokenizer).encode(PROMPT) == [3, 12, 4, 13]
    assert engine(tokenizer).template == ""


def test_messages_and_text_go_through_the_chat_template_when_it_is_asked_for(tokenizer: Any):
    tokenizer.chat_template = TEMPLATE
    chat = engine(tokenizer, apply_chat_template=True, chat_template_kwargs={"more": True})
    messages = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]
    assert chat.encode(replace(PROMPT, prompt=messages)) == [3, 13, 4, 13, 14]
    assert chat.encode(replace(PROMPT, prompt="7")) == [9, 13, 14]
    assert len(chat.template) == 12


def test_messages_without_a_template_are_refused_by_name(tokenizer: Any):
    messages = [{"role": "user", "content": "1"}]
    with pytest.raises(ValueError, match=r"p:0 .*apply_chat_template = true"):
        engine(tokenizer).encode(replace(PROMPT, prompt=messages))


def test_a_prompt_over_the_limit_is_rejected_with_both_numbers(tokenizer: Any):
    assert engine(tokenizer, max_prompt_tokens=4).reject(PROMPT) is None
    reason = engine(tokenizer, max_prompt_tokens=3).reject(PROMPT)
    assert reason == "prompt has 4 tokens, more than max_prompt_tokens = 3"


@pytest.mark.parametrize(
    ("finish_reason", "status"), [("stop", Status.COMPLETED), ("length", Status.TRUNCATED)]
)
async def test_one_request_becomes_one_sample(tokenizer: Any, finish_reason: Any, status: Status):
    client = AnswersOnce(Completion([5, 1], [-0.5, -0.1], finish_reason, 4, 2, 0.25))
    sample = await single_turn.generate(engine(tokenizer, client), PROMPT, CONTEXT)
    assert client.asked == [([3, 12, 4, 13], {"temperature": 1.0}, 9)]
    assert (sample.prompt_text, sample.response_text) == ("1+2=", "3")
    assert (sample.prompt_ids, sample.response_ids) == ([3, 12, 4, 13], [5, 1])
    assert sample.rollout_logprobs == [-0.5, -0.1]
    assert sample.policy_versions == [4, 4]
    assert (sample.status, sample.seed, sample.cached_tokens) == (status, 9, 2)


async def test_without_servers_generating_says_why(tokenizer: Any):
    with pytest.raises(RuntimeError, match=r"rollout.servers = 0"):
        await engine(tokenizer).generate([1], {}, 0)


async def test_a_supervised_sample_is_the_label_and_the_end_of_text(tokenizer: Any):
    sample = await supervised.generate(engine(tokenizer), PROMPT, CONTEXT)
    assert sample.response_ids == [5, tokenizer.eos_token_id]
    assert sample.rollout_logprobs == [0.0, 0.0]
    assert sample.loss_mask == [True, True]
    assert sample.status is Status.COMPLETED


async def test_a_supervised_prompt_needs_a_label(tokenizer: Any):
    with pytest.raises(ValueError, match=r"p:0 has no label"):
        await supervised.generate(engine(tokenizer), replace(PROMPT, label=None), CONTEXT)


def test_seeds_differ_in_every_argument_and_repeat():
    arguments = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    seeds = [sample_seed(*a) for a in arguments]
    assert len(set(seeds)) == 5
    assert seeds == [sample_seed(*a) for a in arguments]
    assert all(0 <= s < 2**31 for s in seeds)
