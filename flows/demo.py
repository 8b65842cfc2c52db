"""The demo: arithmetic from nothing, by supervised warm-up and then GRPO."""

import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from rollflow.storage.config import StoreConfig
from rollflow.tasks.checkpoint import checkpoint_weights

from .arguments import load_config, recipes
from .config import RunConfig
from .progress import RunSummary
from .recipes import arithmetic
from .train import sft, train

FACTS = Path(".rollflow/demo.json")
METRIC = "eval/heldout/reward"
ENOUGH = f'{{metric = "{METRIC}", at_least = 0.93}}'
"""The demo ends once that many held-out sums are right; the recipe itself goes on to its last step."""
FOLDERS = {"cpu": Path(".rollflow/arithmetic"), "gpu": Path(".rollflow/arithmetic-gpu")}
"""Data and model by device. ``warm`` in it is what the recipes of other algorithms start from,
``trained`` what distillation learns from."""


async def run_demo(
    seed: int, seconds_install: float, store: str, ui: str, console: Console, *, gpu: bool = False
) -> None:
    """Make data and model, warm up, train, print what came out and write it to ``demo.json``.

    Args:
        store: URL where runs are kept; that of the recipes where it is empty.
        gpu: with the larger model, on one GPU that trainer and server share.
    """
    started = time.perf_counter()
    device = "gpu" if gpu else "cpu"
    model = arithmetic.GPU_MODEL if gpu else arithmetic.MODEL
    arithmetic.make(FOLDERS[device], seed=seed, model=model)
    name = f"arithmetic-{datetime.now(UTC):%Y%m%d-%H%M%S}-seed{seed}"
    where = ("--store.url", store) if store else ()
    weights = await warm_weights(f"{name}-sft", seed, *where, device=device)
    config = load_config(
        recipes()[f"arithmetic_{device}"],
        seeded(name, seed, "--model.path", weights, "--stop", ENOUGH, *where),
    )
    summary = await train(config)
    trained = await checkpoint_weights(config.store, summary.run, None)
    assert trained is not None, "a run always ends with a checkpoint"
    _keep(trained.path, FOLDERS[device] / "trained")
    facts = demo_facts(summary, seed, seconds_install, time.perf_counter() - started)
    FACTS.write_text(json.dumps({**facts, "ui_url": ui}, indent=2))
    _print(config, facts, ui, console)


async def warm_weights(name: str, seed: int, *words: str, device: str = "cpu") -> str:
    """Teach the format and some of the sums from labels, until about half is right.

    Returns:
        Folder of the weights in Hugging Face's format; a copy is kept in ``FOLDERS``.
    """
    config = load_config(recipes()[f"arithmetic_sft_{device}"], seeded(name, seed, *words))
    summary = await sft(config)
    weights = await checkpoint_weights(config.store, summary.run, None)
    assert weights is not None, "the warm-up always ends with a checkpoint"
    _keep(weights.path, FOLDERS[device] / "warm")
    return weights.path


def seeded(name: str, seed: int, *words: str) -> list[str]:
    """Command-line words for a run of that name in which every seed follows from ``seed``."""
    seeds = ("rollout.seed", "trainer.seed", "data.seed")
    return ["--name", name, *(w for s in seeds for w in (f"--{s}", str(seed))), *words]


def demo_facts(summary: RunSummary, seed: int, seconds_install: float, seconds_run: float) -> dict:
    """The figures of a demo run, by the names that ``demo.json`` uses."""
    curve = {version: metrics[METRIC] for version, metrics in sorted(summary.evaluations.items())}
    return {
        "seed": seed,
        "exact_match_before": curve[min(curve)],
        "exact_match_after": curve[max(curve)],
        "exact_match_by_step": curve,
        "seconds_install": seconds_install,
        "seconds_run": round(seconds_run, 1),
        "logprob_gap_max": summary.logprob_gap_max,
        "iteration_split_s": {k: round(v, 4) for k, v in summary.iteration_split_s.items()},
        "run": summary.run.name,
        "store_url": summary.run.url,
        "picture": summary.picture,
        "tensorboard": summary.tensorboard,
    }


def _keep(weights: str, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(weights, place)


def _print(config: RunConfig, facts: dict, ui: str, console: Console) -> None:
    split = "  ".join(f"{k} {v * 1e3:.0f}" for k, v in facts["iteration_split_s"].items())
    console.print("\nrollflow demo")
    console.print(
        f"Held-out exact match: {facts['exact_match_before']:.3f} after the warm-up, {facts['exact_match_after']:.3f} after GRPO"
    )
    console.print(
        f"Seconds: {facts['seconds_install']:.0f} to install, {facts['seconds_run']:.0f} to run"
    )
    console.print(
        f"Trainer and rollout log-probabilities differ by at most {facts['logprob_gap_max']:.1e}"
    )
    console.print(f"Milliseconds of an iteration: {split}")
    console.print(f"Reward curve: {facts['picture']}")
    console.print(f"Store:        {facts['store_url']}")
    console.print(f"Prefect UI:   {ui}  (stop it by: .venv/bin/rollflow down)")
    console.print(f"Facts:        {FACTS}")
    console.print("Look deeper:")
    where = "" if config.store == StoreConfig() else f" --store {config.store.url}"
    for command in (
        f"rollouts ls {config.name}",
        f"rollouts show {config.name} --step 0",
        "runs ls",
    ):
        console.print(f"  .venv/bin/rollflow {command}{where}")
    console.print(f"  .venv/bin/tensorboard --logdir {facts['tensorboard']}")
