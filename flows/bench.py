"""``rollflow bench``: where an iteration's time goes, on the arithmetic recipe with real engines."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .arguments import load_config, recipes
from .demo import seeded
from .recipes import arithmetic
from .replay import recompute
from .train import train

COMPUTE = ("generate", "score", "train")


async def run_bench(steps: int, output: Path, console: Console) -> None:
    """Train ``steps`` iterations from random weights, then again from their log; print
    and write the medians.
    """
    arithmetic.make(Path(".rollflow/arithmetic"))
    name = f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    words = seeded(
        name,
        0,
        "--steps",
        str(steps),
        "--model.path",
        ".rollflow/arithmetic/model",
        "--model.random_weights",
        "true",
        "--evals",
        "[]",
    )
    config = load_config(recipes()["arithmetic_cpu"], words)
    summary = await train(config)
    split = summary.iteration_split_s
    again = await recompute(config.store, name)
    durability = split.get("write", 0.0) + split["commit"]
    overhead = split["total"] - sum(split.get(phase, 0.0) for phase in COMPUTE)
    facts = {
        "iterations": steps,
        "samples_per_iteration": config.rollout.batch_size * config.rollout.n_samples_per_prompt,
        "iteration_split_s": split,
        "overhead_s": overhead,
        "overhead_fraction": overhead / split["total"],
        "durability_s": durability,
        "durability_fraction": durability / split["total"],
        "redo_step_s": again.step_s,
        "redo_speedup": split["total"] / again.step_s,
        "redo_differences": len(again.differences),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=2))
    table = Table(
        "phase",
        "median ms",
        "share",
        title=f"One iteration of {facts['samples_per_iteration']} samples, median of {steps}",
    )
    for phase, seconds in split.items():
        table.add_row(phase, f"{seconds * 1e3:.1f}", f"{seconds / split['total']:.1%}")
    console.print(table)
    console.print(
        f"Orchestration, storage and weight sync together: {overhead * 1e3:.0f} ms, {overhead / split['total']:.1%} of the iteration"
    )
    console.print(
        f"Durability (write and commit, after overlap): {durability * 1e3:.1f} ms, "
        f"{durability / split['total']:.2%} of the iteration"
    )
    console.print(
        f"A step done again from the log: {again.step_s * 1e3:.0f} ms, "
        f"{split['total'] / again.step_s:.1f} times as fast as the first time; "
        f"{len(again.differences)} of {steps} steps with other weights"
    )
    console.print(f"Figures: {output}")
