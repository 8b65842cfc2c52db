"""Where an iteration's time goes, on the arithmetic recipe; what the log and determinism cost."""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.config import RunConfig
from rollflow.flows.demo import seeded
from rollflow.flows.progress import RunSummary
from rollflow.flows.recipes import arithmetic
from rollflow.flows.replay import recompute
from rollflow.flows.train import train

COMPUTE = ("generate", "score", "train")
STEPS = 30
DETERMINISTIC_STEPS = 6


async def measure(console: Console) -> dict:
    """Train from random weights, then again from the log, then a few steps deterministically."""
    config, summary = await _train("bench", STEPS)
    split = summary.iteration_split_s
    again = await recompute(config.store, config.name)
    few = ("--trainer.lr_decay_style", "constant", "--trainer.lr_warmup_steps", "0")
    exactly = ("--rollout.deterministic", "true")
    _, exact = await _train("bench-exact", DETERMINISTIC_STEPS, *few, *exactly)
    durability = split.get("write", 0.0) + split["commit"]
    overhead = split["total"] - sum(split.get(phase, 0.0) for phase in COMPUTE)
    facts = {
        "iterations": STEPS,
        "samples_per_iteration": config.rollout.batch_size * config.rollout.n_samples_per_prompt,
        "iteration_split_s": split,
        "overhead_s": overhead,
        "overhead_fraction": overhead / split["total"],
        "durability_s": durability,
        "durability_fraction": durability / split["total"],
        "redo_step_s": again.step_s,
        "redo_speedup": split["total"] / again.step_s,
        "redo_differences": len(again.differences),
        "deterministic_generate_s": exact.iteration_split_s["generate"],
        "deterministic_slowdown": exact.iteration_split_s["generate"] / split["generate"],
    }
    _print(facts, console)
    return facts


async def _train(prefix: str, steps: int, *words: str) -> tuple[RunConfig, RunSummary]:
    files = arithmetic.make(Path(".rollflow/arithmetic"))
    name = f"{prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    model = ("--model.path", str(files.model), "--model.random_weights", "true")
    words = ("--steps", str(steps), "--evals", "[]", *model, *words)
    config = load_config(recipes()["arithmetic_cpu"], seeded(name, 0, *words))
    return config, await train(config)


def _print(facts: dict, console: Console) -> None:
    split = facts["iteration_split_s"]
    title = f"One iteration of {facts['samples_per_iteration']} samples, median of {facts['iterations']}"
    table = Table("phase", "median ms", "share", title=title)
    for phase, seconds in split.items():
        table.add_row(phase, f"{seconds * 1e3:.1f}", f"{seconds / split['total']:.1%}")
    console.print(table)
    console.print(
        f"Orchestration, storage and weight sync together: {facts['overhead_s'] * 1e3:.0f} ms, "
        f"{facts['overhead_fraction']:.1%} of the iteration"
    )
    console.print(
        f"Durability (write and commit, after overlap): {facts['durability_s'] * 1e3:.1f} ms, "
        f"{facts['durability_fraction']:.2%} of the iteration"
    )
    console.print(
        f"A step done again from the log: {facts['redo_step_s'] * 1e3:.0f} ms, "
        f"{facts['redo_speedup']:.1f} times as fast as the first time; "
        f"{facts['redo_differences']} of {facts['iterations']} steps with other weights"
    )
    console.print(
        f"rollout.deterministic: generation takes {facts['deterministic_generate_s'] * 1e3:.0f} ms, "
        f"{facts['deterministic_slowdown']:.1f} times as long"
    )
