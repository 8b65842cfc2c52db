"""Tables for people: runs, batches, samples."""

import time
from typing import TYPE_CHECKING

import httpx
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rollflow.storage.config import StoreConfig
from rollflow.storage.inspect import batch_rows, batch_samples, find_sample, run_rows
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.samples import Sample

from .status import read_statuses, server_lines

if TYPE_CHECKING:
    from .config import RunConfig
    from .progress import RunSummary

BATCH_METRICS = (
    "rollout/reward",
    "rollout/response_len",
    "rollout/truncated_ratio",
    "rollout/failed",
)


def print_runs(url: str, console: Console) -> None:
    """One line a run: steps, newest checkpoint, newest reward."""
    store = Store(StoreConfig(url=url))
    rows = run_rows(store)
    if not rows:
        console.print(f"no run in {store.root}; --store names another place", highlight=False)
        return
    # A name is what the next command needs: whatever else has no room, it does.
    name = Column("run", no_wrap=True, min_width=max(len(row["name"]) for row in rows))
    table = Table(name, "created", "steps", "checkpoint", "reward", "code", box=None)
    for row in rows:
        table.add_row(
            row["name"],
            row["created_at"][:19],
            str(row["steps"]),
            "" if row["checkpoint"] is None else str(row["checkpoint"]),
            "" if row["reward"] is None else f"{row['reward']:.3f}",
            row["code_revision"],
        )
    console.print(table)


def print_batches(url: str, run: str, newest: int, console: Console) -> None:
    """One line a batch of a run; a batch that is not committed yet is marked."""
    store = Store(StoreConfig(url=url))
    names = [name.removeprefix("rollout/") for name in BATCH_METRICS]
    table = Table("step", "samples", "groups", *names, "digest", box=None)
    for row in batch_rows(store, open_run(store, run), newest=newest):
        if not row["committed"]:
            table.add_row(str(row["step"]), "removed" if "removed" in row else "being written")
            continue
        numbers = [f"{row['metrics'].get(name, float('nan')):.3f}" for name in BATCH_METRICS]
        table.add_row(
            str(row["step"]), str(row["rows"]), str(row["groups"]), *numbers, row["digest"][:12]
        )
    console.print(table)


def print_samples(url: str, run: str, step: int | None, limit: int, console: Console) -> None:
    """Samples of a step as a table, of the newest unless ``step`` is given.

    Raises:
        ValueError: the step has no batch.
    """
    store = Store(StoreConfig(url=url))
    samples = batch_samples(store, open_run(store, run), step)
    _print_table(samples[:limit], console)
    graders = ", ".join(sorted({s.grader for s in samples}))
    console.print(
        f"{min(limit, len(samples))} of {len(samples)} samples of step {samples[0].step}; grader {graders}"
    )


def print_filtered(samples: list[Sample], console: Console) -> None:
    """Samples of any steps as a table."""
    _print_table(samples, console)
    console.print(f"{len(samples)} samples")


def print_sample(url: str, run: str, sample_id: str, console: Console) -> None:
    """One sample with every token.

    Raises:
        ValueError: the run has no sample of that id.
    """
    store = Store(StoreConfig(url=url))
    _print_facts(find_sample(store, open_run(store, run), sample_id), console)


def _print_table(samples: list[Sample], console: Console) -> None:
    table = Table("sample", "prompt", "answer", "label", "reward", "status", "version", box=None)
    for sample in samples:
        table.add_row(
            Text(sample.sample_id),
            Text(_short(sample.prompt_text)),
            Text(_short(sample.response_text)),
            Text(_short(sample.label or "")),
            "" if sample.reward is None else f"{sample.reward:.3f}",
            sample.status.value,
            _versions(sample),
        )
    console.print(table)


def _print_facts(sample: Sample, console: Console) -> None:
    facts = Table(box=None, show_header=False)
    for name in (
        "sample_id",
        "prompt_id",
        "prompt_text",
        "response_text",
        "label",
        "reward",
        "reward_parts",
        "grader",
        "previous_reward",
        "previous_grader",
        "status",
        "finish_reason",
        "seed",
        "sampling",
        "engine",
        "metadata",
        "generate_s",
        "score_s",
    ):
        facts.add_row(name, Text(str(getattr(sample, name))))
    console.print(facts)
    tokens = Table("token", "log-prob", "version", "trained on", box=None)
    columns = (
        sample.response_ids,
        sample.rollout_logprobs,
        sample.policy_versions,
        sample.loss_mask,
    )
    for token, logprob, version, trained in zip(*columns, strict=True):
        tokens.add_row(str(token), f"{logprob:.4f}", str(version), "yes" if trained else "no")
    console.print(tokens)


def _versions(sample: Sample) -> str:
    versions = sorted(set(sample.policy_versions))
    return "-".join(str(v) for v in (versions[:1] + versions[1:][-1:]))


def _short(text: str, length: int = 60) -> str:
    flat = text.replace("\n", "⏎")
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def print_status(console: Console) -> None:
    """What the flows of this folder are doing, by their status files."""
    table = Table("run", "step", "phase", "for", "process", box=None)
    for status in read_statuses():
        table.add_row(
            status.run,
            str(status.step),
            Text(status.phase),
            f"{time.time() - status.since:.0f} s",
            str(status.pid) if status.alive else "gone",
        )
    console.print(table)


def print_queue(api_url: str, console: Console) -> None:
    """What runs, waits or is suspended on the Prefect server."""
    try:
        rows = server_lines(api_url)
    except httpx.HTTPError as error:
        console.print(f"the Prefect server at {api_url} does not answer: {error}", highlight=False)
        return
    table = Table("flow run", "of", "state", box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table if rows else "no flow run by a deployment runs or waits")


def print_summary(config: "RunConfig", summary: "RunSummary", ui: str, console: Console) -> None:
    """How a run ended and where its traces are."""
    console.print(f"\n{config.name}: {summary.outcome} in {summary.seconds:.0f} s")
    for version, metrics in sorted(summary.evaluations.items()):
        shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k.endswith("/reward"))
        console.print(f"  after {version} steps: {shown}")
    console.print(f"  store:       {summary.run.url}")
    console.print(f"  picture:     {summary.picture}")
    console.print(f"  Prefect UI:  {ui}")
    console.print(f"  TensorBoard: tensorboard --logdir {summary.tensorboard}")
    console.print(f"  samples:     rollflow rollouts show {config.name} --store {config.store.url}")
