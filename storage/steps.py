"""Commit point B: a step is done once its record is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .integrity import ManifestError, Record, pack_metrics, seal, unpack_metrics, unseal
from .lease import check_fence
from .objects import Store
from .refs import RunRef, StepRef

FORMAT = "rollflow.step/1"
_SAME = ("batch_digest", "weights_digest", "ledger", "rng")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What ``steps/step-000012.json`` holds."""

    ref: StepRef
    ledger: dict[str, Any]
    """Which prompts were issued, completed and consumed."""
    rng: dict[str, Any]
    """State that the next step starts from."""
    committed_at: str
    """UTC, ISO 8601."""
    epoch: int
    """Fencing epoch of the writer."""


def commit_step(
    store: Store,
    run: RunRef,
    step: int,
    batch_digest: str,
    weights_digest: str,
    metrics: Mapping[str, float],
    ledger: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
) -> StepRef:
    """Write the record of a step, after everything that it speaks of: commit point B.

    A step that is committed already with the same batch, weights, ledger and RNG gives the record
    that stands, with its own metrics (seconds differ when a step is done again). With others it is
    a ManifestError that names what differs. LeaseLostError where the epoch of ``run`` is over.
    """
    url = step_url(run, step)
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "epoch": run.epoch,
        "step": step,
        "batch_digest": batch_digest,
        "weights_digest": weights_digest,
        "metrics": pack_metrics(metrics),
        "ledger": dict(ledger or {}),
        "rng": dict(rng or {}),
        "committed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    check_fence(store, run)
    try:
        store.put_new(url, seal(record))
    except FileExistsError:
        standing = unseal(store.get(url), url, FORMAT)
        for key in _SAME:
            if standing[key] != record[key]:
                raise ManifestError(
                    url, f"{key} {standing[key]}, as committed before", record[key]
                ) from None
        return _record(run, url, standing).ref
    return _record(run, url, record).ref


def last_step(store: Store, run: RunRef) -> StepRef | None:
    """Give the newest committed step, or None before the first."""
    numbers = step_numbers(store, run)
    return read_step(store, run, numbers[-1]).ref if numbers else None


def read_steps(store: Store, run: RunRef) -> list[StepRef]:
    """Give all committed steps in order, verified; ManifestError where one between is missing."""
    urls = [step_url(run, number) for number in step_numbers(store, run)]
    records = zip(urls, store.get_all(urls), strict=True)
    return [_record(run, url, unseal(data, url, FORMAT)).ref for url, data in records]


def read_step(store: Store, run: RunRef, step: int) -> StepRecord:
    """Read a step's whole record; FileNotFoundError where the step is not committed."""
    url = step_url(run, step)
    return _record(run, url, unseal(store.get(url), url, FORMAT))


def step_numbers(store: Store, run: RunRef) -> list[int]:
    """Give the numbers of the committed steps in order; ManifestError where one is missing."""
    names = store.children(f"{run.url}/steps")
    numbers = sorted(int(n[5:-5]) for n in names if n.startswith("step-") and n.endswith(".json"))
    for expected, found in enumerate(numbers):
        if expected != found:
            raise ManifestError(step_url(run, expected), "a step record", f"only step {found} on")
    return numbers


def step_url(run: RunRef, step: int) -> str:
    """Give the URL of a step's record."""
    return f"{run.url}/steps/step-{step:06d}.json"


def _record(run: RunRef, url: str, record: Record) -> StepRecord:
    place = f"runs/{record['run']}/steps/step-{record['step']:06d}.json"
    if not url.endswith(f"/{place}"):
        raise ManifestError(url, "the record of that step", f"the one of {place}")
    ref = StepRef(
        run=run,
        step=record["step"],
        url=url,
        batch_digest=record["batch_digest"],
        weights_digest=record["weights_digest"],
        metrics=unpack_metrics(record["metrics"]),
    )
    return StepRecord(
        ref, record["ledger"], record["rng"], record["committed_at"], record.get("epoch", 0)
    )
