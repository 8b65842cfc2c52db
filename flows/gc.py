"""``rollflow gc``: remove what a run does not need any more."""

import os

from rollflow.storage import lease as leases
from rollflow.storage.leftovers import clear_leftovers, find_leftovers
from rollflow.storage.retention import find_garbage, remove

from .terminal import console, opened

LEASE_S = 60.0


def collect_garbage(store_url: str, name: str, keep: int, rollouts: bool, dry_run: bool) -> None:
    """Remove superseded checkpoints, leftovers and, if asked, rollouts; only say so in a dry run.

    Raises:
        LeaseHeldError: a flow writes the run.
    """
    store, run = opened(store_url, name)
    if dry_run:
        found = find_garbage(store, run, keep, rollouts)
        leftovers = [leftover for leftover in find_leftovers(store, run) if leftover.is_final]
    else:
        lease = leases.acquire(store, run, f"gc of {name} (pid {os.getpid()})", LEASE_S)
        with leases.kept(lease):
            found = find_garbage(store, lease.run, keep, rollouts)
            remove(store, lease.run, found)
            leftovers = clear_leftovers(store, lease.run)
    verb = "would remove" if dry_run else "removed"
    for ref in (*found.checkpoints, *found.batches):
        console.print(f"{verb} {ref.url}", highlight=False)
    for leftover in leftovers:
        console.print(f"{verb} {leftover.url} ({leftover.reason})", highlight=False)
    for url, reason in found.kept.items():
        console.print(f"kept {url}: {reason}", highlight=False)
    console.print(
        f"{verb} {len(found.checkpoints)} checkpoints, {len(found.batches)} batches, "
        f"{len(leftovers)} leftovers"
    )
