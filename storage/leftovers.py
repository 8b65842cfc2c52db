"""What interrupted and late writers left in a run: never read and named by no record."""

from dataclasses import dataclass

from .checkpoints import (
    checkpoint_steps,
    checkpoint_url,
    find_checkpoint,
    find_checkpoint_strays,
    is_checkpoint_file,
)
from .integrity import ManifestError
from .lease import check_fence
from .manifests import batch_steps, dataset_names, find_batch, find_strays
from .objects import Store
from .refs import RunRef
from .shards import PART_NAME


@dataclass(frozen=True, slots=True)
class Leftover:
    """An object or temporary file that nobody needs."""

    url: str
    reason: str
    is_final: bool = True
    """Whether no writer, however late, can make it count any more: only then it may be deleted."""


def find_leftovers(store: Store, run: RunRef) -> list[Leftover]:
    """Find all leftovers of a run, in order of their URLs.

    The parts of a step that is not committed are none: the next writer takes what is good in them.
    Nothing in a folder whose manifest is damaged is one either.
    """
    found = [Leftover(url, "temporary file") for url in store.temporaries(run.url)]
    for dataset in (None, *dataset_names(store, run)):
        for step in batch_steps(store, run, dataset):
            found += _of_batch(store, run, step, dataset)
    for step in checkpoint_steps(store, run):
        found += _of_checkpoint(store, run, step)
    return sorted(found, key=lambda leftover: leftover.url)


def clear_leftovers(store: Store, run: RunRef) -> list[Leftover]:
    """Delete the final leftovers of a run and say which; for whoever has just taken its lease.

    The files of an unfinished checkpoint stay until the checkpoint of that step is committed: a
    writer that sleeps right before its commit may still finish it. LeaseLostError where the epoch
    of ``run`` is over.
    """
    check_fence(store, run)
    leftovers = [leftover for leftover in find_leftovers(store, run) if leftover.is_final]
    for leftover in leftovers:
        store.delete(leftover.url)
    return leftovers


def _of_batch(store: Store, run: RunRef, step: int, dataset: str | None) -> list[Leftover]:
    try:
        ref = find_batch(store, run, step, dataset)
        strays = find_strays(store, ref) if ref else []
    except ManifestError:
        return []
    names = {url: url.rpartition("/")[2] for url in strays}
    reason = "part that the batch's manifest does not name"
    return [Leftover(url, reason) for url in strays if PART_NAME.fullmatch(names[url])]


def _of_checkpoint(store: Store, run: RunRef, step: int) -> list[Leftover]:
    try:
        ref = find_checkpoint(store, run, step)
        strays = find_checkpoint_strays(store, ref) if ref else []
    except ManifestError:
        return []
    reason = "file that the checkpoint's manifest does not name"
    if ref is None:
        strays, reason = store.list(checkpoint_url(run, step)), "file of an unfinished checkpoint"
    files = [url for url in strays if is_checkpoint_file(run, step, url)]
    return [Leftover(url, reason, is_final=ref is not None) for url in files]
