"""IFEval's instructions, each with an answer that follows it and one that does not."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from rollflow.engines.hooks import load_hook, parse_reward
from rollflow.engines.rewards import ifeval
from rollflow.engines.rewards.instructions import CHECKS, follows, sentences
from rollflow.storage.samples import Sample, Status

EMPTY = Sample(
    run="r", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="g#0",
    prompt_text="", response_text="", prompt_ids=[], response_ids=[], loss_mask=[],
    rollout_logprobs=[], policy_versions=[], status=Status.COMPLETED, finish_reason="stop",
)  # fmt: skip

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "c++"]}, "A Cat writes C++.", "A cat writes C."),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "at least"},
        "Rain, rain go away",
        "Rain go away",
    ),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "less than"},
        "Rain go away",
        "Rain, rain go away",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "The CAT sat."),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
        "Elves wee",
        "Elves",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One is 1.5. Two? Three!",
        "Mr. A. Smith pays 1.5 e.g. in May. Two?",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        "one two - three",
        "one two three four",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "one\n***\ntwo\n***",
        "one\n***\n***\ntwo",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "yes"},
        'no\n\n\n\n"Yes," he said',
        "yes\n\nno",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "Dear [name], [date]",
        "Dear [name],",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\np. s. I forgot",
        "Bye. The https service stops.",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye.\nP.P.S. more",
        "Bye.\nP.S. more",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "List:\n* a\n  - b\n**bold**",
        "* a\n* b\n* c",
    ),
    ("detectable_format:constrained_response", {}, "Well: My answer is no.", "my answer is no."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        "**one** and ** ** and\n* two\n* three",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSection 2\nb",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', 'Here: {"a": [1]}'),
    ("detectable_format:title", {}, "<<My poem>>\nRoses", "<< >>\nRoses"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it. "},
        "say it.\nIt.",
        "It is: say it.",
    ),
    ("startend:end_checker", {"end_phrase": "Any more?"}, '"Well. any more?" ', "Any more? No."),
    ("startend:quotation", {}, ' "all of it" ', '"all" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "NASA's WELL-KNOWN U.S. HQ",
        "NASA HQ in Houston",
    ),
    ("change_case:english_capital", {}, "ALL OF IT, 1.", "ALL Of IT"),
    ("change_case:english_lowercase", {}, "all of it, 1.", "all Of it"),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
]


def answered(response: str, names: list[str] | None, kwargs: Any) -> Sample:
    metadata = {"instruction_id_list": names, "kwargs": kwargs}
    return replace(EMPTY, response_text=response, metadata=metadata)


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), CASES)
def test_an_answer_that_follows_is_told_from_one_that_does_not(
    instruction: str, arguments: dict[str, Any], good: str, bad: str
):
    assert follows(instruction, arguments, good)
    assert not follows(instruction, arguments, bad)


def test_there_is_a_case_for_each_of_the_benchmarks_ids_but_language():
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) == 24


@pytest.mark.parametrize("instruction", CHECKS)
def test_a_blank_answer_follows_nothing(instruction: str):
    arguments = next(case[1] for case in CASES if case[0] == instruction)
    assert not follows(instruction, arguments, " \n")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two", 2),
        ('He said "Stop!" Then left.', 2),
        ("Wait... what?!", 2),
        ("Dr. No has 3.5 kg, i.e. much. See a.b.c", 2),
        ("A heading\n\nA line.", 2),
        ("* one.\n* two.\n", 2),
        ("Cats, dogs etc. are pets. Cats, etc. Dogs too.", 3),
        ("J. R. R. Tolkien wrote it. No. He did", 3),
    ],
)
def test_sentences_are_counted_without_a_word_list(text: str, count: int):
    assert sentences(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "." * 50_000 + "x",
        "[" * 50_000,
        "<<" * 30_000,
        "\n" * 50_000 + "x",
        "* " * 30_000,
        "a." * 30_000 + "1",
        "```" + " " * 50_000 + "x",
        "[[" + "[" * 50_000,
    ],
)
def test_no_answer_takes_long_to_check(text: str):
    for instruction, arguments, _, _ in CASES:
        started = time.process_time()
        follows(instruction, arguments, text)
        assert time.process_time() - started < 0.5, instruction


def test_arguments_that_are_none_are_as_if_not_given():
    row = {"num_words": 2.0, "relation": "at least", "keywords": None, "language": None}
    assert follows("length_constraints:number_words", row, "two words")


@pytest.mark.parametrize(
    ("instruction", "arguments", "message"),
    [
        ("language:response_language", {"language": "de"}, "needs a language detector"),
        ("keyword:existence", {}, "did you mean 'keywords:existence'"),
        ("length:words", {}, "is not known"),
        ("length_constraints:number_words", {"num_words": 3}, "missing .*'relation'; it takes num"),
        ("punctuation:no_comma", {"n": 3}, "unexpected .*'n'; it takes no arguments"),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "about"},
            "'about'; give 'at least' or 'less than'",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_and_not_called_wrong(
    instruction: str, arguments: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        follows(instruction, arguments, "text")


def test_all_accuracies_are_parts_whichever_is_trained_on():
    names = ["punctuation:no_comma", "startend:quotation", "startend:end_checker"]
    sample = answered('Sure, here it is:\n"One line"', names, [{}, {}, {"end_phrase": "line"}])
    parts = {
        "prompt_strict": 0.0,
        "instruction_strict": pytest.approx(1 / 3),
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
        "punctuation:no_comma": 0.0,
        "startend:quotation": 0.0,
        "startend:end_checker": 1.0,
    }
    assert parse_reward(ifeval.strict(sample)) == (0.0, parts)
    assert parse_reward(ifeval.loose(sample)) == (1.0, parts)
    assert parse_reward(ifeval.share(sample)) == (pytest.approx(1 / 3), parts)


def test_an_answer_that_follows_all_has_one_in_every_accuracy():
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    reward, parts = parse_reward(ifeval.strict(answered("fine", names, None)))
    assert reward == 1.0
    assert set(parts.values()) == {1.0}


def test_an_instruction_that_a_prompt_has_twice_is_reported_as_a_share():
    names = ["keywords:existence"] * 2
    sample = answered("a cat", names, [{"keywords": ["cat"]}, {"keywords": ["dog"]}])
    assert ifeval.share(sample)["keywords:existence"] == 0.5
    assert ifeval.share(sample)["reward"] == 0.5


@pytest.mark.parametrize(
    ("response", "instruction", "arguments"),
    [
        ("Sure, here:\nplain text", "punctuation:no_comma", {}),
        ("plain text\nHope, this helps", "punctuation:no_comma", {}),
        ("Sure, here:\nplain text\nHope, this helps", "punctuation:no_comma", {}),
        ("**The End**", "startend:end_checker", {"end_phrase": "the end"}),
        ('Here:\n*"quoted"*\nBye', "startend:quotation", {}),
    ],
)
def test_loose_forgives_first_line_last_line_and_emphasis(
    response: str, instruction: str, arguments: dict[str, Any]
):
    parts = ifeval.strict(answered(response, [instruction], [arguments]))
    assert (parts["prompt_strict"], parts["prompt_loose"]) == (0.0, 1.0)


def test_what_is_followed_strictly_is_followed_loosely_and_eight_forms_are_tried():
    assert ifeval.loose_forms("a\n*b*\nc") == [
        "a\n*b*\nc", "a\n*b*", "*b*\nc", "*b*", "a\nb\nc", "a\nb", "b\nc", "b",
    ]  # fmt: skip
    for instruction, arguments, good, _ in CASES:
        parts = ifeval.strict(answered(good, [instruction], [arguments]))
        assert parts["prompt_strict"] == parts["prompt_loose"] == 1.0


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (None, None, "no instruction_id_list"),
        (["punctuation:no_comma"], [{}, {}], "2 kwargs for 1 instructions"),
        (["language:response_language"], [{"language": "de"}], "language detector"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_an_error_and_not_wrong(
    names: Any, kwargs: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        ifeval.strict(answered("text", names, kwargs))


@pytest.mark.parametrize("name", ["strict", "loose", "share"])
def test_they_load_as_reward_hooks(name: str):
    assert load_hook(f"rollflow.engines.rewards.ifeval:{name}", "reward") is getattr(ifeval, name)


def test_a_row_of_the_benchmark_is_read_as_it_is(tmp_path: Any):
    from rollflow.storage.config import DataConfig, StoreConfig
    from rollflow.storage.objects import Store
    from rollflow.storage.prompts import load_prompts

    row = {
        "key": 1000,
        "prompt": "Say hello without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 2, "relation": "at least"}],
    }
    path = tmp_path / "ifeval.jsonl"
    path.write_text(json.dumps(row) + "\n")
    store = Store(StoreConfig(url=str(tmp_path / "store")))
    [prompt] = load_prompts(store, DataConfig(path=str(path))).prompts
    sample = replace(EMPTY, response_text="Hello there", metadata=prompt.metadata)
    assert ifeval.strict(sample)["reward"] == 1.0
