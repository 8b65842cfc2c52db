"""Long-tailed answers: what waits for the last of them, with early stop and partial rollouts and without."""

import statistics
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.demo import FOLDERS, seeded
from rollflow.flows.recipes import arithmetic
from rollflow.flows.train import train
from rollflow.storage.manifests import find_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.steps import read_steps

from .long_tail import notes

STEPS, FIRST = 14, 3
"""Steps of each run, and the first that counts: what was cut off before it goes on in it."""
GROUPS, SAMPLES = 8, 4
SLOTS = GROUPS * SAMPLES
"""Answers in flight at once, in both."""
WAYS = {
    "wait for all": (),
    "early stop, partial": (
        "--rollout.early_stop", "true",
        "--rollout.over_sampling_batch_size", str(2 * GROUPS),
        "--rollout.max_staleness", "8",
    ),
}  # fmt: skip


async def measure(console: Console) -> dict:
    """Train on simulated long-tailed answers in both ways; print and give the figures by way."""
    arithmetic.make(FOLDERS["cpu"])
    found = {way: await _one(words) for way, words in WAYS.items()}
    title = f"Long-tailed answers, {SLOTS} in flight, means of {STEPS - FIRST} steps"
    table = Table("", "step s", "generate s", "slots idle in it", "idle s of a step",
                  "samples/s", "tokens/s", "oldest token", title=title)  # fmt: skip
    for way, f in found.items():
        table.add_row(
            way,
            f"{f['step_s']:.2f}",
            f"{f['generate_s']:.2f}",
            f"{f['generate_idle']:.0%}",
            f"{f['idle_s']:.2f}",
            f"{f['samples_per_s']:.1f}",
            f"{f['tokens_per_s']:.0f}",
            f"{f['staleness_max']:.0f}",
        )
    console.print(table)
    return found


async def _one(words: tuple[str, ...]) -> dict[str, float]:
    name = f"bench-tail-{'early' if words else 'all'}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    settings = (
        "--steps", str(STEPS), "--evals", "[]", "--trainer.lr_warmup_steps", "0",
        "--model.path", str(FOLDERS["cpu"] / "model"), "--model.random_weights", "true",
        "--rollout.generate", "rollflow.flows.bench.long_tail:generate",
        "--rollout.batch_size", str(GROUPS), "--rollout.n_samples_per_prompt", str(SAMPLES),
        "--rollout.concurrency", str(SLOTS), "--rollout.servers", "1", "--trainer.ranks", "1",
        *words,
    )  # fmt: skip
    config = load_config(recipes()["arithmetic_cpu"], seeded(name, 0, *settings))
    summary = await train(config)
    store = Store(config.store)
    steps = read_steps(store, summary.run)[FIRST:]
    busy: dict[int, list[dict[str, float]]] = {}
    for note in notes(name):
        busy.setdefault(int(note["step"]), []).append(note)
    spans, used, oldest, tokens = [], [], 0, []
    for record in steps:
        of_step = busy[record.step]
        began, ended = (f(n[k] for n in of_step) for f, k in ((min, "started"), (max, "ended")))
        spans.append(ended - began)
        used.append(sum(n["ended"] - n["started"] for n in of_step) / SLOTS)
        batch = find_batch(store, summary.run, record.step)
        assert batch is not None
        samples = read_batch(store, batch)
        versions = [v for sample in samples for v in sample.policy_versions]
        oldest = max(oldest, record.step - min(versions, default=record.step))
        tokens.append(len(versions))
    step_s = summary.iteration_split_s["total"]
    rest_s = step_s - summary.iteration_split_s["generate"]
    generate_s, used_s = statistics.mean(spans), statistics.mean(used)
    whole_s = generate_s + rest_s
    return {
        "step_s": whole_s,
        "generate_s": generate_s,
        "generate_idle": 1.0 - used_s / generate_s,
        "idle_s": whole_s - used_s,
        "samples_per_s": SLOTS / whole_s,
        "tokens_per_s": statistics.mean(tokens) / whole_s,
        "staleness_max": float(oldest),
    }
