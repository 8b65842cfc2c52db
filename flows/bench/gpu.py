"""One GPU that trainer and server share: training alone, whole iterations, weight sync, memory."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.demo import seeded
from rollflow.flows.recipes import throughput
from rollflow.flows.train import train
from rollflow.storage.objects import Store
from rollflow.storage.steps import read_steps
from rollflow.tasks.measure import gpu_name, train_alone

SHAPES = ("0.6b",)
STEPS = 8
SETTLED = 3
"""Steps that are not counted: they compile, and take memory for the first time."""
ALONE = {
    "samples": 128,
    "prompt_tokens": 64,
    "new_tokens": 512,
    "tokens_per_micro_batch": 18432,
    "steps": 4,
}


async def measure(console: Console) -> dict:
    """Measure each shape; nothing where torch sees no GPU."""
    card = gpu_name()
    if not card:
        console.print("bench gpu: torch sees no GPU here; skipped")
        return {"skipped": "no GPU"}
    facts: dict[str, Any] = {"card": card}
    for shape in SHAPES:
        facts[shape] = await _measure_shape(shape)
        _print(shape, card, facts[shape], console)
    return facts


async def _measure_shape(shape: str) -> dict[str, Any]:
    files = throughput.make(Path(".rollflow/throughput") / shape, shape)
    alone = train_alone(str(files.model), **ALONE, deterministic=False)
    exact = train_alone(str(files.model), **ALONE, deterministic=True)
    name = f"bench-gpu-{shape}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    words = ("--steps", str(STEPS), "--model.path", str(files.model), "--data.path")
    config = load_config(recipes()["throughput_gpu"], seeded(name, 0, *words, str(files.train)))
    summary = await train(config)
    steps = [s.metrics for s in read_steps(Store(config.store), summary.run)][SETTLED:]
    split = summary.iteration_split_s
    return {
        "mfu": alone["mfu"],
        "mfu_deterministic": exact["mfu"],
        "train_tokens_per_s": alone["tokens_per_s"],
        "train_alone": alone,
        "train_alone_deterministic": exact,
        "generate_fraction_of_raw": None,
        "iteration_s": split["total"],
        "iteration_split_s": split,
        "sync_ms": 1e3 * split["sync"],
        "orchestration_ms": 1e3 * split["orchestration"],
        "mismatch_kl": max(m["mismatch/kl"] for m in steps),
        "mismatch_gap_mean": max(m["mismatch/logprob_gap_mean"] for m in steps),
        "generate_tokens_per_s": _median(steps, "perf/tokens_per_s"),
        "old_logprob_s": _median(steps, "perf/old_logprob_s"),
        "sleep_s": _median(steps, "perf/sleep_s"),
        "gpu_free_gib": [m["perf/gpu_free_gib"] for m in steps],
        "gpu_kept_gib": [m["perf/gpu_kept_gib"] for m in steps],
        "gpu_peak_gib": max(m["perf/gpu_peak_gib"] for m in steps),
    }


def _median(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(m[name] for m in steps)


def _print(shape: str, card: str, facts: dict[str, Any], console: Console) -> None:
    table = Table("what", "figure", title=f"Qwen3-{shape} with random weights on one {card}")
    rows = {
        "training alone, tokens/s": f"{facts['train_tokens_per_s']:,.0f}",
        "its share of a measured matrix product's FLOP/s": f"{facts['mfu']:.1%}",
        "the same, deterministic": f"{facts['mfu_deterministic']:.1%}",
        "generation, tokens/s": f"{facts['generate_tokens_per_s']:,.0f}",
        "iteration, s": f"{facts['iteration_s']:.2f}",
        "weight sync, ms": f"{facts['sync_ms']:.0f}",
        "orchestration, ms": f"{facts['orchestration_ms']:.0f}",
        "log-probability mismatch, KL": f"{facts['mismatch_kl']:.2e}",
        "free for the trainer, GiB": f"{min(facts['gpu_free_gib']):.1f}",
        "kept by the trainer, GiB, by step": ", ".join(f"{g:.2f}" for g in facts["gpu_kept_gib"]),
    }
    for row in rows.items():
        table.add_row(*row)
    for phase, seconds in facts["iteration_split_s"].items():
        table.add_row(f"  {phase}, ms", f"{seconds * 1e3:.0f}")
    console.print(table)
