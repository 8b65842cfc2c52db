"""Commit point B: a step is done once its record is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .integrity import ManifestError, Record, pack_metrics, seal, unpack_metrics, unseal
from .lease import check_fence
from .objects import Store
from .refs import RunRef, StepRef
from .runs import RunNotFound, read_run

FORMAT = "rollflow.step/1"
_SAME = ("batch_digest", "ledger", "rng")
FIRST_WEIGHTS = -1
"""In place of a checkpoint's step: the weights that the run began with."""


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
    layout: dict[str, int]
    """How many ranks computed the step, and how the model was split over them; empty where the
    record does not say. Weights are the same bit for bit within one layout, else up to rounding."""
    restored_step: int
    """Step of the checkpoint from which the trainer came here, or ``FIRST_WEIGHTS``."""
    functions: dict[str, str]
    """The user's own ``advantage`` and ``loss`` that computed the step, with the digests of their files."""


def commit_step(
    store: Store,
    run: RunRef,
    step: int,
    batch_digest: str,
    weights_digest: str,
    metrics: Mapping[str, float],
    ledger: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
    layout: Mapping[str, int] | None = None,
    restored_step: int = FIRST_WEIGHTS,
    functions: Mapping[str, str] | None = None,
) -> StepRef:
    """Write the record of a step, after everything that it speaks of: commit point B.

    A step that is committed already with the same batch, weights, ledger and RNG gives the record
    that stands, with its own metrics (seconds differ when a step is done again). With others it is
    a ManifestError that names what differs; weights may differ where ``layout`` does, for another
    number of ranks rounds otherwise. LeaseLostError where the epoch of ``run`` is over.
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
        "layout": dict(layout or {}),
        "restored_step": restored_step,
        "functions": dict(functions or {}),
        "committed_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    check_fence(store, run)
    try:
        store.put_new(url, seal(record))
    except FileExistsError:
        standing = unseal(store.get(url), url, FORMAT)
        same_layout = standing.get("layout", {}) == record["layout"]
        by = [r.get("functions", {}) for r in (standing, record)]
        changed = f"; computed by {by[0]} then, by {by[1]} now" if by[0] != by[1] else ""
        for key in (*_SAME, *(("weights_digest",) if same_layout else ())):
            if standing[key] != record[key]:
                raise ManifestError(
                    url, f"{key} {standing[key]}, as committed before", f"{record[key]}{changed}"
                ) from None
        return _record(run, url, standing).ref
    return _record(run, url, record).ref


def last_step(store: Store, run: RunRef) -> StepRef | None:
    """Give the newest committed step, or None before the first."""
    numbers = step_numbers(store, run)
    return read_step(store, run, numbers[-1]).ref if numbers else None


def read_steps(store: Store, run: RunRef) -> list[StepRef]:
    """Give all committed steps in order, verified; ManifestError where one between is missing."""
    return [record.ref for record in read_step_records(store, run)]


def read_step_records(store: Store, run: RunRef) -> list[StepRecord]:
    """Read the whole records of all committed steps in order, verified like ``read_steps``."""
    urls = [step_url(run, number) for number in step_numbers(store, run)]
    records = zip(urls, store.get_all(urls), strict=True)
    return [_record(run, url, unseal(data, url, FORMAT)) for url, data in records]


def read_step(store: Store, run: RunRef, step: int) -> StepRecord:
    """Read a step's whole record; FileNotFoundError where the step is not committed."""
    url = step_url(run, step)
    return _record(run, url, unseal(store.get(url), url, FORMAT))


def step_numbers(store: Store, run: RunRef) -> list[int]:
    """Give the numbers of the committed steps in order; ManifestError where one is missing."""
    names = store.children(f"{run.url}/steps")
    numbers = sorted(int(n[5:-5]) for n in names if n.startswith("step-") and n.endswith(".json"))
    first = first_step(store, run) if numbers and numbers[0] else 0
    for expected, found in enumerate(numbers, start=first):
        if expected != found:
            raise ManifestError(step_url(run, expected), "a step record", f"only step {found} on")
    return numbers


def first_step(store: Store, run: RunRef) -> int:
    """Give the step that a run begins with: 0, unless it goes on from another run."""
    try:
        origin = read_run(store, run.name).origin
    except RunNotFound:
        return 0
    return origin.first_step if origin else 0


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
        ref,
        record["ledger"],
        record["rng"],
        record["committed_at"],
        record.get("epoch", 0),
        record.get("layout", {}),
        record.get("restored_step", FIRST_WEIGHTS),
        record.get("functions", {}),
    )
