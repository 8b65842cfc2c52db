"""How fast one GPU trains: tokens a second, and its share of what a matrix product reaches there."""

import random
import statistics
import time
from typing import Any

import torch

from rollflow.engines import meeting
from rollflow.engines.algorithms.config import SftConfig
from rollflow.engines.config import ModelConfig
from rollflow.storage.samples import Sample, Status

from .config import GatesConfig, TrainerConfig
from .cost import row_flops
from .model import read_hf_config
from .rank import Rank

WARM_UP = 3
MATRIX = 8192
"""Rows and columns of the bfloat16 product that is the ceiling."""


def measure(
    model_path: str,
    *,
    samples: int,
    prompt_tokens: int,
    new_tokens: int,
    tokens_per_micro_batch: int,
    steps: int,
    deterministic: bool,
) -> dict[str, Any]:
    """Supervised steps on random samples of one length, from random weights in bfloat16."""
    torch.cuda.reset_peak_memory_stats()
    rank = Rank.join(
        0,
        1,
        meeting.open_store("127.0.0.1"),
        model=ModelConfig(path=model_path, dtype="bfloat16", random_weights=True),
        trainer=TrainerConfig(
            max_tokens_per_micro_batch=tokens_per_micro_batch,
            deterministic=deterministic,
        ),
        megatron={"lr": 1e-6, "weight_decay": 0.0, "clip_grad": 1.0},
        algorithm=SftConfig(),
        gates=GatesConfig(),
        temperature=1.0,
        total_steps=WARM_UP + steps,
        device="cuda",
    )
    vocab_size = read_hf_config(ModelConfig(path=model_path)).vocab_size
    seconds: list[float] = []
    try:
        for step in range(WARM_UP + steps):
            batch = _samples(step, samples, prompt_tokens, new_tokens, vocab_size)
            torch.cuda.synchronize()
            started = time.perf_counter()
            rank.train(batch, step)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        flops = (
            3 * samples * row_flops(rank.transformer_config, vocab_size, prompt_tokens + new_tokens)
        )
    finally:
        rank.leave()
    step_s = statistics.median(seconds[WARM_UP:])
    ceiling = matrix_flops_per_s()
    return {
        "step_s": step_s,
        "first_step_s": seconds[0],
        "steps_s": seconds,
        "tokens_per_s": samples * (prompt_tokens + new_tokens) / step_s,
        "tflops": flops / step_s / 1e12,
        "ceiling_tflops": ceiling / 1e12,
        "mfu": flops / step_s / ceiling,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "card": torch.cuda.get_device_name(),
    }


def matrix_flops_per_s() -> float:
    """What a bfloat16 product of random square matrices reaches on this GPU."""
    left, right = torch.randn(2, MATRIX, MATRIX, device="cuda").bfloat16()
    times: list[float] = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(left, right)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * MATRIX**3 / statistics.median(times[2:])


def _samples(
    step: int, count: int, prompt_tokens: int, new_tokens: int, vocab_size: int
) -> list[Sample]:
    draw = random.Random(step)
    tokens = [draw.choices(range(vocab_size), k=prompt_tokens + new_tokens) for _ in range(count)]
    return [
        Sample(
            run="speed",
            step=step,
            group_id=f"{i}",
            index=0,
            prompt_id=f"{i}",
            source_row=i,
            episode_id=f"{i}",
            prompt_text="",
            response_text="",
            prompt_ids=ids[:prompt_tokens],
            response_ids=ids[prompt_tokens:],
            loss_mask=[True] * new_tokens,
            rollout_logprobs=[0.0] * new_tokens,
            policy_versions=[step] * new_tokens,
            status=Status.COMPLETED,
            finish_reason="length",
        )
        for i, ids in enumerate(tokens)
    ]
