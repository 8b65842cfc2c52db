"""Our training step beside plain transformers: the same model, samples, loss and optimizer."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from rollflow.engines import meeting
from rollflow.engines.algorithms.config import SftConfig
from rollflow.engines.config import ModelConfig
from rollflow.storage.samples import Sample, Status

from .config import GatesConfig, TrainerConfig
from .rank import Rank

WARM_UP = 2
TOKENS = 4096
RATE = 1e-4


def compare(model_path: str, steps: int, samples_per_step: int) -> dict[str, Any]:
    """Seconds and tokens per second of both, in this process on one thread, and how far losses differ.

    Supervised steps on ragged random samples of 8 to 96 tokens. transformers gets rows of similar
    length padded to the longest, as many tokens at a time as we pack.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_path)
    # transformers does not train the embedding of the padding token.
    tokens = [t for t in range(config.vocab_size) if t != config.pad_token_id]
    batches = [_samples(step, samples_per_step, tokens) for step in range(WARM_UP + steps)]
    with tempfile.TemporaryDirectory(prefix="rollflow-compare-") as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        theirs = _timed(_transformers_step(folder), batches)
        rank = _rank(Path(folder), steps)
        try:
            ours = _timed(
                lambda batch, step: rank.train(batch, step)["train/loss"],
                batches,
            )
        finally:
            rank.leave()
    losses = zip(ours.pop("losses"), theirs.pop("losses"), strict=True)
    return {
        "megatron": ours,
        "transformers": theirs,
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "cpu_ratio": ours["tokens_per_cpu_s"] / theirs["tokens_per_cpu_s"],
        "loss_gap": max(abs(a - b) for a, b in losses),
        "samples_per_step": samples_per_step,
    }


def _timed(
    train: Callable[[Sequence[Sample], int], float], batches: Sequence[Sequence[Sample]]
) -> dict[str, Any]:
    seconds: list[float] = []
    computed: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []
    for step, batch in enumerate(batches):
        started, computing = time.perf_counter(), time.process_time()
        losses.append(train(batch, step))
        seconds.append(time.perf_counter() - started)
        computed.append(time.process_time() - computing)
        tokens.append(sum(len(s.prompt_ids) + len(s.response_ids) for s in batch))
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    compute_rates = [n / s for n, s in zip(tokens, computed, strict=True)]
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "tokens_per_s": statistics.median(rates[WARM_UP:]),
        "tokens_per_cpu_s": statistics.median(compute_rates[WARM_UP:]),
        "losses": losses,
    }


def _rank(model: Path, steps: int) -> Rank:
    return Rank.join(
        0,
        1,
        meeting.open_store("127.0.0.1"),
        model=ModelConfig(path=str(model)),
        trainer=TrainerConfig(max_tokens_per_micro_batch=TOKENS),
        megatron={"lr": RATE, "weight_decay": 0.0, "clip_grad": 1.0},
        algorithm=SftConfig(),
        gates=GatesConfig(),
        temperature=1.0,
        total_steps=WARM_UP + steps,
        device="cpu",
    )


def _transformers_step(folder: str) -> Callable[[Sequence[Sample], int], float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def train(batch: Sequence[Sample], step: int) -> float:
        trained = sum(len(s.response_ids) for s in batch)
        adamw.zero_grad()
        total = 0.0
        for rows in _padded_batches(batch):
            tokens, mask, labels = _padded(rows)
            logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
            loss = cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / trained).backward()
            total += loss.item() / trained
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return total

    return train


def _padded_batches(batch: Sequence[Sample]) -> list[list[Sample]]:
    rows = sorted(batch, key=lambda s: len(s.prompt_ids) + len(s.response_ids))
    cut: list[list[Sample]] = [[]]
    for row in rows:
        longest = len(row.prompt_ids) + len(row.response_ids)
        if cut[-1] and (len(cut[-1]) + 1) * longest > TOKENS:
            cut.append([])
        cut[-1].append(row)
    return cut


def _padded(rows: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(s.prompt_ids) + len(s.response_ids) for s in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for i, s in enumerate(rows):
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        labels[i, len(s.prompt_ids) : len(ids)] = ids[len(s.prompt_ids) :]
    return tokens, mask, labels


def _samples(step: int, count: int, tokens: Sequence[int]) -> list[Sample]:
    draw = random.Random(step)
    samples: list[Sample] = []
    for n in range(count):
        prompt = draw.choices(tokens, k=draw.randint(4, 32))
        response = draw.choices(tokens, k=draw.randint(4, 64))
        samples.append(
            Sample(
                run="compare",
                step=step,
                group_id=f"{step}/{n}",
                index=0,
                prompt_id=str(n),
                source_row=n,
                episode_id=str(n),
                prompt_text="",
                response_text="",
                prompt_ids=prompt,
                response_ids=response,
                loss_mask=[True] * len(response),
                rollout_logprobs=[0.0] * len(response),
                policy_versions=[step] * len(response),
                status=Status.COMPLETED,
                finish_reason="stop",
                reward=None,
            )
        )
    return samples
