"""Graders on answers as models write them."""

from dataclasses import replace

import pytest
from aiohttp import web

from rollflow.engines.rewards import mathematics, remote, text
from rollflow.storage.samples import Sample, Status

EMPTY = Sample(
    run="r", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="g#0",
    prompt_text="", response_text="", prompt_ids=[], response_ids=[], loss_mask=[],
    rollout_logprobs=[], policy_versions=[], status=Status.COMPLETED, finish_reason="stop",
)  # fmt: skip


def answered(response: str, label: str | None) -> Sample:
    return replace(EMPTY, response_text=response, label=label)


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"\boxed{3} or rather \boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{4}", "5", 0.0),
        ("it is 5", "5", 0.0),
        (r"\boxed{5", "5", 0.0),
    ],
)
def test_boxed_answers_are_compared_by_meaning(response: str, label: str, reward: float):
    assert mathematics.boxed(answered(response, label))["reward"] == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [("steps\nAnswer: 34", 1.0), ("Answer: 33", -1.0), ("34", -1.0), (r"\boxed{34}", 1.0)],
)
def test_dapo_answers_give_one_or_minus_one(response: str, reward: float):
    assert mathematics.dapo(answered(response, "34")) == {"reward": reward, "acc": (reward + 1) / 2}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A is tempting, but the answer is (C).", "C"),
        ("**Answer: b**", "B"),
        (r"hence \boxed{D}", "D"),
        ("B) 42", "B"),
        ("I cannot say", None),
    ],
)
def test_the_letter_that_an_answer_settles_on_is_found(response: str, letter: str | None):
    assert text.chosen_letter(response) == letter


def test_f1_counts_words_and_takes_the_best_of_several_labels():
    found = text.f1(answered("The cat sat.", "a dog|||cat sat down"))
    assert found["precision"] == 1.0
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["reward"] == pytest.approx(0.8)


@pytest.mark.parametrize("grader", [mathematics.boxed, text.f1, text.multiple_choice])
def test_a_sample_without_a_label_is_an_error_and_not_wrong(grader):
    with pytest.raises(ValueError, match="label is None"):
        grader(answered("x", None))


async def test_a_remote_reward_model_is_asked_by_http(monkeypatch: pytest.MonkeyPatch):
    async def score(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"reward": len(body["response"]), "style": 0.5})

    async def classify(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response([{"embedding": [0.0, float(len(body["text"]))]}])

    app = web.Application()
    app.router.add_post("/score", score)
    app.router.add_post("/classify", classify)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    monkeypatch.setenv(remote.URL, f"http://{host}:{port}/score")
    assert await remote.remote(answered("four", None)) == {"reward": 4, "style": 0.5}
    monkeypatch.setenv(remote.URL, f"http://{host}:{port}/")
    assert await remote.sglang(answered("four", None)) == 4.0
    await runner.cleanup()
