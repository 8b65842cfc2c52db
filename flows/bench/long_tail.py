"""A generate function whose answers are long-tailed: each token takes its time, as on a large model."""

import asyncio
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from rollflow.storage.samples import Prompt, Sample, Status

TOKEN_S = 0.1
"""Seconds that a token takes, beside what the engine takes."""
SHORTEST, LONGEST, SHAPE = 4, 60, 1.1
"""Tokens: a Pareto distribution, cut at ``LONGEST``. Half of the answers have at most 8."""
LOGS = Path(".rollflow/bench-tail")


def length(seed: int) -> int:
    """Tokens of the answer with that seed."""
    share = random.Random(seed).random()
    return min(LONGEST, math.ceil(SHORTEST * (1.0 - share) ** (-1.0 / SHAPE)))


async def generate(engine: Any, prompt: Prompt, context: Any) -> Sample:
    """Sample token by token; one that was cut off goes on. When it began and ended goes to a file."""
    started, begun = time.time(), context.partial
    prompt_ids = begun.prompt_ids if begun else engine.encode(prompt)
    ids = list(begun.response_ids) if begun else []
    logprobs = list(begun.rollout_logprobs) if begun else []
    versions = list(begun.policy_versions) if begun else []
    target = begun.metadata["length"] if begun else length(context.seed)
    status, reason = Status.COMPLETED, "stop"
    while len(ids) < target:
        one = {**context.sampling, "max_new_tokens": 1, "ignore_eos": True}
        answer = await engine.generate([*prompt_ids, *ids], one, context.seed + len(ids))
        ids += answer.token_ids
        logprobs += answer.logprobs
        versions += answer.policy_versions
        if answer.finish_reason == "abort":
            status, reason = Status.ABORTED, "abort"
            break
        await asyncio.sleep(TOKEN_S)
    _note(context.run, {"step": context.step, "started": started, "ended": time.time()})
    return context.sample(
        prompt,
        engine.tokenizer.decode(prompt_ids),
        prompt_ids,
        ids,
        engine.tokenizer.decode(ids, skip_special_tokens=True),
        logprobs,
        status=status,
        finish_reason=reason,
        policy_versions=versions,
        metadata={"length": target},
        generate_s=time.time() - started,
    )


def notes(run: str) -> list[dict[str, float]]:
    """When each answer of a run began and ended (seconds), and its step."""
    return [json.loads(line) for line in (LOGS / f"{run}.jsonl").read_text().splitlines()]


def _note(run: str, what: dict[str, float]) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{run}.jsonl").open("a") as log:
        log.write(json.dumps(what) + "\n")
