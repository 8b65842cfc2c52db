"""The three modes side by side: how long a step takes, what idles, and what a second teaches."""

import statistics
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.demo import FOLDERS, seeded, warm_weights
from rollflow.flows.recipes import arithmetic
from rollflow.flows.train import train
from rollflow.storage.manifests import find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import read_steps

MODES = ("sync", "one_step_ahead", "async")
STEPS = 40
ONE_CORE_EACH = ("--rollout.servers", "1", "--trainer.ranks", "1")
"""Two servers and two ranks would share two cores: nothing could overlap."""
ENDS = 10
"""Steps at either end whose mean rewards tell what was learned between."""


async def measure(console: Console) -> dict:
    """Train from the demo's warmed-up weights in each mode; print and give the figures by mode."""
    arithmetic.make(FOLDERS["cpu"])
    if not (FOLDERS["cpu"] / "warm").is_dir():
        await warm_weights(f"bench-warm-{datetime.now(UTC):%Y%m%d-%H%M%S}", 0)
    found = {mode: await _one(mode) for mode in MODES}
    sync = found["sync"]
    rest_s = sync["step_s"] - sync["generate_s"] - sync["train_s"]
    predicted_s = max(sync["generate_s"], sync["train_s"]) + rest_s
    for facts in found.values():
        facts["predicted_s"] = sync["step_s"] if facts is sync else predicted_s
        facts["over_predicted"] = facts["step_s"] / facts["predicted_s"] - 1.0
    _print(found, console)
    return found


async def _one(mode: str) -> dict[str, float]:
    name = f"bench-{mode.replace('_', '-')}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    words = ("--steps", str(STEPS), "--evals", "[]", "--rollout.mode", mode)
    config = load_config(recipes()["arithmetic_cpu"], seeded(name, 0, *words, *ONE_CORE_EACH))
    summary = await train(config)
    store = Store(config.store)
    steps = read_steps(store, summary.run)
    generate_s, train_s = (
        statistics.median(s.metrics[f"perf/{phase}_s"] for s in steps)
        for phase in ("generate", "train")
    )
    step_s = summary.iteration_split_s["total"]
    rewards = [s.metrics["rollout/reward"] for s in steps]
    learned = statistics.mean(rewards[-ENDS:]) - statistics.mean(rewards[:ENDS])
    per_step = learned / (STEPS - ENDS)
    return {
        "step_s": step_s,
        "generate_s": generate_s,
        "train_s": train_s,
        "samples_per_s": config.rollout.batch_size * config.rollout.n_samples_per_prompt / step_s,
        "rollout_idle": max(0.0, 1.0 - generate_s / step_s),
        "trainer_idle": max(0.0, 1.0 - train_s / step_s),
        "reward_per_step": per_step,
        "reward_per_s": per_step / step_s,
        "staleness_max": float(_staleness(store, summary.run, len(steps))),
        "staleness_bound": float(config.rollout.staleness),
    }


def _staleness(store: Store, run: RunRef, steps: int) -> int:
    """How many versions behind its step the oldest token is that was trained on."""
    oldest = 0
    for step in range(steps):
        batch = find_batch(store, run, step)
        assert batch is not None
        versions = (v for sample in read_batch(store, batch) for v in sample.policy_versions)
        oldest = max(oldest, step - min(versions, default=step))
    return oldest


def _print(found: dict[str, dict[str, float]], console: Console) -> None:
    table = Table("", *found, title=f"Modes on the arithmetic recipe, medians of {STEPS} steps")
    rows = {
        "step, ms": lambda f: f"{f['step_s'] * 1e3:.0f}",
        "as predicted": lambda f: f"{f['predicted_s'] * 1e3:.0f} ({f['over_predicted']:+.0%})",
        "generate, ms": lambda f: f"{f['generate_s'] * 1e3:.0f}",
        "train, ms": lambda f: f"{f['train_s'] * 1e3:.0f}",
        "rollout idle": lambda f: f"{f['rollout_idle']:.0%}",
        "trainer idle": lambda f: f"{f['trainer_idle']:.0%}",
        "samples/s": lambda f: f"{f['samples_per_s']:.0f}",
        "reward gained per step": lambda f: f"{f['reward_per_step']:+.4f}",
        "reward gained per s": lambda f: f"{f['reward_per_s']:+.4f}",
        "oldest token, versions": lambda f: (
            f"{f['staleness_max']:.0f} of {f['staleness_bound']:.0f}"
        ),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(f) for f in found.values()))
    console.print(table)
