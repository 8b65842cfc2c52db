"""Where weights and samples came from, and what became of them."""

import json
import re

from rich.table import Table
from rich.text import Text

from rollflow.storage.inspect import find_sample
from rollflow.storage.lineage import TrainedStep, trained_steps
from rollflow.storage.objects import Store
from rollflow.storage.origins import log_batch
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import read_run
from rollflow.storage.samples import Sample
from rollflow.storage.steps import read_step
from rollflow.tasks.lineage import Influence, influence, trained_ids

from .terminal import console, opened

CHECKPOINT = re.compile(r"(?:.*/)?(?:checkpoints/)?step-(\d+)")


def print_lineage(store_url: str, run: str, target: str, ids: bool) -> None:
    """Where ``target`` came from: a checkpoint (``step-000010``) or a sample (its id).

    Raises:
        ValueError: the run has neither.
    """
    store, ref = opened(store_url, run)
    if "#" in target:
        print_sample_lineage(store, ref, target)
    elif found := CHECKPOINT.fullmatch(target.rstrip("/")):
        print_checkpoint_lineage(store, ref, int(found[1]), ids)
    else:
        raise ValueError(
            f"{target!r} is neither a checkpoint, such as step-000010, nor a sample, such as "
            "'000010/train.jsonl:7#3'"
        )


def print_checkpoint_lineage(store: Store, run: RunRef, step: int, ids: bool) -> None:
    """The batches, and with ``ids`` the samples one a line, that a checkpoint was trained on."""
    steps = trained_steps(store, run, step)
    if ids:
        for trained in steps:
            for sample_id in _ids(store, trained):
                print(f"{trained.batch.run.name}\t{trained.record.ref.step}\t{sample_id}")
        return
    table = Table("run", "step", "samples in the batch", "batch", "weights after it", box=None)
    for trained in steps:
        record = trained.record.ref
        table.add_row(
            Text(trained.run.name),
            str(record.step),
            str(trained.batch.rows),
            record.batch_digest[:12],
            record.weights_digest[:12],
        )
    console.print(table)
    console.print(
        f"checkpoint of step {step} of {run.name}: {len(steps)} steps, "
        f"{sum(t.batch.rows for t in steps)} samples; --ids lists those that were trained on"
    )


def print_sample_lineage(store: Store, run: RunRef, sample_id: str) -> None:
    """Everything that is known of a sample: where it came from and what it did."""
    sample = find_sample(store, run, sample_id)
    facts: dict[str, object] = {
        "sample": sample.sample_id,
        "run": sample.run,
        "prompt": f"{sample.prompt_id}, row {sample.source_row} of its file, label {sample.label!r}",
        "episode": sample.episode_id,
        "seed": sample.seed,
        "sampling": json.dumps(sample.sampling),
        "engine": sample.engine,
        "template": sample.template or "none",
        "policy version by token": _versions(sample),
        "ended": f"{sample.status.value} ({sample.finish_reason}), {len(sample.response_ids)} tokens",
        "reward": sample.reward,
        "reward parts": json.dumps(sample.reward_parts),
        "grader": sample.grader,
    }
    if sample.previous_grader:
        facts["earlier reward"] = f"{sample.previous_reward} by {sample.previous_grader}"
    facts |= _use(store, run, sample)
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    console.print(table)


def _use(store: Store, run: RunRef, sample: Sample) -> dict[str, object]:
    """The step that trained on a sample, and how much it counted there."""
    batch = log_batch(store, run, sample.step)
    try:
        record = read_step(store, run, sample.step)
    except FileNotFoundError:
        return {"trained on by": "no step yet"}
    if batch is None or record.ref.batch_digest != batch.digest:
        return {"trained on by": "no step: the batch is not the one that its step consumed"}
    settings = read_run(store, run.name).settings
    found = influence(store, settings, TrainedStep(run, record, batch), sample)
    used = f"step {record.ref.step} of {run.name}, batch {batch.digest[:12]}"
    own = {f"own {field}": version for field, version in record.functions.items()}
    return {"trained on by": used, **own, **_counted(found)}


def _counted(found: Influence) -> dict[str, object]:
    if found.advantage is None:
        return {"advantage": "none: it was left out of the update"}
    norm = f"gradient norm {found.grad_norm:.4g}"
    if not found.clipped:
        clip = f"not clipped ({norm}, limit {found.clip_grad:g})"
    else:
        clip = (
            f"clipped to {found.clip_grad / found.grad_norm:.1%} ({norm}, limit "
            f"{found.clip_grad:g}); this sample's share of it: {found.share:.2%}"
        )
    return {
        "advantage": f"{found.advantage:+.6f}",
        "share of the update": f"{found.share:.2%} of update {found.update}, by |advantage| x weight",
        "gradient": clip,
    }


def _ids(store: Store, trained: TrainedStep) -> list[str]:
    return trained_ids(read_run(store, trained.run.name).settings, trained, store)


def _versions(sample: Sample) -> str:
    """``3 x 12, 4 x 7``: runs of equal versions in order of the tokens."""
    runs: list[list[int]] = []
    for version in sample.policy_versions:
        if runs and runs[-1][0] == version:
            runs[-1][1] += 1
        else:
            runs.append([version, 1])
    return ", ".join(f"{version} x {count} tokens" for version, count in runs) or "no token"
