"""Samples of any number and length, without an engine: for measuring the store alone."""

import numpy as np
import pyarrow as pa

from rollflow.storage.schema import SCHEMA

VOCABULARY = 151_936
_WORDS = "the sum of two numbers is what we want to find here so let us add them up step by step "


def table(run: str, step: int, groups: int, per_group: int, tokens: int) -> pa.Table:
    """A batch of ``groups x per_group`` answers of ``tokens`` tokens each, the same for the same step.

    Token ids follow a power law, as words do; log-probabilities have the noise of real ones.
    """
    random = np.random.default_rng(step)
    rows = groups * per_group
    rank = random.zipf(1.2, rows * tokens) % VOCABULARY
    group = np.repeat(np.arange(groups), per_group)
    prompt_ids = [f"train.jsonl:{(step * groups + g) % 100_000}" for g in group]
    text = (_WORDS * (tokens * 4 // len(_WORDS) + 1))[: tokens * 4]
    columns = {
        "run": pa.array([run] * rows),
        "step": pa.array(np.full(rows, step, np.int64)),
        "group_id": pa.array([f"{step:06d}/{name}" for name in prompt_ids]),
        "index": pa.array(np.tile(np.arange(per_group, dtype=np.int64), groups)),
        "prompt_id": pa.array(prompt_ids),
        "source_row": pa.array((step * groups + group).astype(np.int64)),
        "episode_id": pa.array([f"{step}-{row}" for row in range(rows)]),
        "prompt_text": pa.array([_WORDS] * rows),
        "response_text": pa.array([f"{row} {text}" for row in range(rows)]),
        "prompt_ids": _lists(random.integers(0, VOCABULARY, rows * 64).astype(np.int32), 64),
        "response_ids": _lists(rank.astype(np.int32), tokens),
        "loss_mask": _lists(np.ones(rows * tokens, bool), tokens),
        "rollout_logprobs": _lists(
            -random.exponential(0.6, rows * tokens).astype(np.float32), tokens
        ),
        "policy_versions": _lists(np.full(rows * tokens, step, np.int32), tokens),
        "status": pa.array(["completed"] * rows),
        "finish_reason": pa.array(["stop"] * rows),
        "reward": pa.array((random.random(rows) < 0.5).astype(np.float64)),
        "reward_parts": pa.array(
            [[("length", float(tokens))]] * rows, SCHEMA.field("reward_parts").type
        ),
        "grader": pa.array(
            ["rollflow.engines.rewards.exact_match:exact_match@0123456789ab"] * rows
        ),
        "label": pa.array([str(row) for row in range(rows)]),
        "metadata": pa.array(["{}"] * rows),
        "sampling": pa.array(['{"temperature": 1.0}'] * rows),
        "seed": pa.array(random.integers(0, 2**31, rows)),
        "engine": pa.array(["sglang 0.5.18"] * rows),
        "template": pa.array([""] * rows),
        "generate_s": pa.array(random.random(rows)),
        "score_s": pa.array(random.random(rows) / 1000),
        "cached_tokens": pa.array(np.zeros(rows, np.int64)),
        "previous_reward": pa.nulls(rows, pa.float64()),
        "previous_grader": pa.array([""] * rows),
        "routed_experts": pa.nulls(rows, pa.large_binary()),
    }
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _lists(flat: np.ndarray, length: int) -> pa.ListArray:
    offsets = np.arange(0, len(flat) + 1, length, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat))
