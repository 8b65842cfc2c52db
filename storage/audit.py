"""The whole of a run, verified: every byte, and that every sample was trained on exactly once."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from .checkpoints import (
    checkpoint_steps,
    checkpoint_url,
    files_folder,
    find_checkpoint,
    verify_checkpoint,
)
from .integrity import ManifestError, json_digest, unseal
from .lease import HEARTBEAT_FORMAT, claimed_epochs, read_claim
from .ledger import read_issue
from .leftovers import Leftover, find_leftovers
from .manifests import (
    ISSUED,
    batch_folder,
    batch_steps,
    dataset_names,
    find_batch,
    manifest_parts,
    read_manifest,
    read_table,
)
from .objects import Store
from .origins import batch_home
from .refs import BatchRef, RunRef
from .retention import REMOVED, removed_digest
from .runs import RunNotFound, read_run
from .shards import MANIFEST, PART_NAME
from .steps import StepRecord, read_step, step_url

T = TypeVar("T")

_STEP = re.compile(r"step-(\d{6,})\.json")
_FOLDERS = ("lease", "rollouts", "evals", "checkpoints", "steps")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    name: str
    """URL of the object, or the name of the sample."""
    reason: str


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit looked at and what it found."""

    run: RunRef
    counts: dict[str, int]
    """How many of each kind were verified, e.g. ``{"batches": 12, "samples": 3072, ...}``."""
    findings: list[Finding] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    """Harmless: what interrupted or superseded writers left, which nobody reads."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found; leftovers do not count."""
        return not self.findings


def audit_run(store: Store, run: RunRef) -> AuditReport:
    """Read every object of a run and check each alone and all against one another.

    Findings name the object and the reason: a checksum or place that is wrong, a sample in two
    batches, a batch that its step's record does not consume or that another consumes, policy
    versions that go back or lie above the step, epochs that go back, a checkpoint with other
    weights than its step's record, an object that belongs to nothing.
    """
    audit = _Audit(store, run)
    audit.check_run()
    audit.check_leases()
    records = audit.check_steps()
    batches = audit.check_batches()
    audit.check_consumption(batches, records)
    for dataset in dataset_names(store, run):
        audit.check_evaluations(dataset)
    audit.check_checkpoints(records)
    leftovers = find_leftovers(store, run)
    audit.check_objects({leftover.url for leftover in leftovers})
    counts = {kind: audit.counts[kind] for kind in sorted(audit.counts)}
    return AuditReport(run, counts, audit.findings, leftovers)


class _Audit:
    """The findings so far, and the objects that are accounted for."""

    def __init__(self, store: Store, run: RunRef) -> None:
        self._store = store
        self._run = run
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self._known: set[str] = set()
        self._damaged_folders: set[str] = set()
        self._batch_of_group: dict[str, str] = {}
        self._continued: dict[str, str] = {}
        """Groups that were put back, and as which group of a later step they went on."""
        self._first, self._home = 0, run
        """Where the run's steps begin, and the run that holds its batches: of one made from another."""

    def check_run(self) -> None:
        """The config is the one that the run was created with."""
        url = f"{self._run.url}/run.json"
        self._known.add(url)
        try:
            record = self._read(lambda: read_run(self._store, self._run.name))
        except RunNotFound:
            return self._find(url, "no such object")
        if record and record.origin:
            self._first = record.origin.first_step
            self._home = batch_home(self._store, self._run)
        if record and json_digest(record.config) != record.config_digest:
            self._find(url, "config_digest is not the config's")
        return None

    def check_leases(self) -> None:
        """No epoch is missing between the first and the last."""
        folder = f"{self._run.url}/lease"
        epochs = claimed_epochs(self._store, self._run)
        for epoch in range(1, max(epochs, default=0) + 1):
            url = f"{folder}/epoch-{epoch:06d}.json"
            self._known.add(url)
            if self._read(lambda e=epoch: read_claim(self._store, self._run, e), url):
                self.counts["leases"] += 1
        for name in self._store.children(folder):
            if name.startswith("heartbeat-"):
                url = f"{folder}/{name}"
                self._known.add(url)
                self._read(lambda u=url: unseal(self._store.get(u), u, HEARTBEAT_FORMAT))

    def check_steps(self) -> dict[int, StepRecord]:
        """Every step up to the newest has a record; their epochs never go back."""
        names = self._store.children(f"{self._run.url}/steps")
        numbers = [int(found[1]) for found in map(_STEP.fullmatch, names) if found]
        records: dict[int, StepRecord] = {}
        for step in range(self._first, max(numbers, default=-1) + 1):
            url = step_url(self._run, step)
            self._known.add(url)
            if record := self._read(lambda s=step: read_step(self._store, self._run, s), url):
                records[step] = record
                self.counts["steps"] += 1
        self._check_rising({step_url(self._run, s): r.epoch for s, r in records.items()}, "epoch")
        return records

    def check_batches(self) -> dict[int, BatchRef]:
        """Every batch is whole and its own; versions and epochs never go back."""
        batches: dict[int, BatchRef] = {}
        versions: dict[str, int] = {}
        epochs: dict[str, int] = {}
        for step in batch_steps(self._store, self._run):
            folder = batch_folder(self._run, step)
            ref, table = self._batch(step, None)
            if ref is None:
                continue
            batches[step] = ref
            manifest = read_manifest(self._store, folder)
            url = f"{folder}/{MANIFEST}"
            epochs[url] = manifest.get("epoch", 0)
            if found := manifest["policy_versions"]:
                bound = manifest["ledger"].get("max_staleness", 0)
                if (
                    not bound
                ):  # else a step may be finished by weights that are older than the last's
                    versions[url] = max(found)
                if max(found) > step:
                    self._find(url, f"policy version {max(found)} is above step {step}")
                if "max_staleness" in manifest["ledger"] and min(found) < step - bound:
                    self._find(
                        url, f"policy version {min(found)} is more than {bound} behind step {step}"
                    )
            if table is not None:
                self._check_groups(ref, table)
                self.counts["samples"] += table.num_rows
                self.counts["groups"] += ref.groups
                self.counts["batches"] += 1
        self._check_rising(versions, "policy version")
        self._check_rising(epochs, "epoch")
        return batches

    def check_consumption(
        self, batches: dict[int, BatchRef], records: dict[int, StepRecord]
    ) -> None:
        """A batch is consumed by the record of its step, and by no other."""
        for step in range(self._first, max([*batches, *records], default=-1) + 1):
            folder = batch_folder(self._home, step)
            record, batch = records.get(step), batches.get(step)
            if self._home != self._run:
                batch = self._read(lambda s=step: find_batch(self._store, self._home, s))
            if batch is None and folder not in self._damaged_folders:
                self._check_removed(step, record)
            elif record and batch and record.ref.batch_digest != batch.digest:
                reason = f"consumes batch {record.ref.batch_digest}; the step's is {batch.digest}"
                self._find(record.ref.url, reason)
            elif batch and record is None:
                self.counts["batches not consumed yet"] += 1
        users = Counter(record.ref.batch_digest for record in records.values())
        for record in records.values():
            if users[record.ref.batch_digest] > 1:
                self._find(record.ref.url, "consumes a batch that another step consumes too")

    def _check_removed(self, step: int, record: StepRecord | None) -> None:
        """A batch that is not there was removed on purpose, and is the one that its step consumed."""
        folder = batch_folder(self._home, step)
        digest = self._read(lambda: removed_digest(self._store, self._home, step), folder=folder)
        if digest is None:
            self._find(f"{folder}/{MANIFEST}", "no such object")
        elif record is None or record.ref.batch_digest != digest:
            self._find(
                f"{folder}/{REMOVED}", f"removed batch {digest} is not what the step consumed"
            )
        else:
            self._known.add(f"{folder}/{REMOVED}")
            self.counts["batches removed"] += 1

    def check_evaluations(self, dataset: str) -> None:
        """Every evaluation that is committed is whole."""
        for step in batch_steps(self._store, self._run, dataset):
            ref, table = self._batch(step, dataset)
            if ref and table is not None:
                self.counts["evaluations"] += 1

    def check_checkpoints(self, records: dict[int, StepRecord]) -> None:
        """Every byte is as written, and the weights are those of the step's record."""
        for step in checkpoint_steps(self._store, self._run):
            url = checkpoint_url(self._run, step)
            try:
                ref = find_checkpoint(self._store, self._run, step)
            except ManifestError as error:
                self._damage(error, url)
                continue
            if ref is None:
                continue
            self._known.add(f"{url}/{MANIFEST}")
            if files := self._read(lambda r=ref: verify_checkpoint(self._store, r), folder=url):
                folder = files_folder(self._store, ref)
                self._known |= {self._store.join(folder, file.name) for file in files}
                self.counts["checkpoints"] += 1
            record = records.get(step)
            if record is None and step == self._first - 1:
                self.counts["checkpoints of the run it goes on from"] += 1
            elif record is None:
                self._find(f"{url}/{MANIFEST}", f"step {step} has no record")
            elif record.ref.weights_digest != ref.weights_digest:
                found = f"weights {ref.weights_digest}; {record.ref.weights_digest} in the record"
                self._find(f"{url}/{MANIFEST}", f"{found} of step {step}")

    def check_objects(self, leftovers: set[str]) -> None:
        """Every object in the run's folders belongs to something."""
        for url in self._store.list(self._run.url):
            self.counts["objects"] += 1
            if url in self._known or url in leftovers:
                continue
            if any(url.startswith(f"{folder}/") for folder in self._damaged_folders):
                continue
            if url.removeprefix(f"{self._run.url}/").partition("/")[0] in _FOLDERS:
                self._find(url, "belongs to nothing")

    def _batch(self, step: int, dataset: str | None) -> tuple[BatchRef | None, pa.Table | None]:
        """Read a batch; account for its objects, or for those of one that is not committed."""
        folder = batch_folder(self._run, step, dataset)
        issued = [n for n in self._store.children(folder) if ISSUED.fullmatch(n)]
        if dataset is None and issued:
            self._known |= {f"{folder}/{name}" for name in issued}
            self._read(lambda: read_issue(self._store, self._run, step))
        try:
            ref = find_batch(self._store, self._run, step, dataset)
        except ManifestError as error:
            self._damage(error, folder)
            return None, None
        names = [n for n in self._store.children(folder) if PART_NAME.fullmatch(n)]
        if ref:
            names = [p.name for p in manifest_parts(read_manifest(self._store, folder))]
            names.append(MANIFEST)
        else:
            self.counts["unfinished parts"] += len(names)
        self._known |= {f"{folder}/{name}" for name in names}
        if ref is None:
            return None, None
        table = self._read(lambda: read_table(self._store, ref), folder=folder)
        if table is not None:
            self._check_rows(ref, table)
        return ref, table

    def _check_rows(self, ref: BatchRef, table: pa.Table) -> None:
        """The samples say the same as their manifest of run, step and versions."""
        url = f"{ref.url}/{MANIFEST}"
        for column, expected in (("run", self._run.name), ("step", ref.step)):
            if others := set(table.column(column).unique().to_pylist()) - {expected}:
                self._find(url, f"samples of {column} {sorted(others)[0]!r}")
        found = table.column("policy_versions").combine_chunks().flatten().unique().to_pylist()
        named = set(read_manifest(self._store, ref.url)["policy_versions"])
        if unnamed := sorted(set(found) - named):
            self._find(url, f"samples of policy version {unnamed[0]}, which it does not name")

    def _check_groups(self, ref: BatchRef, table: pa.Table) -> None:
        """No group is in two batches, and every one was issued where there is an issue."""
        url = f"{ref.url}/{MANIFEST}"
        groups = set(table.column("group_id").to_pylist())
        for group_id in sorted(groups):
            if (first := self._batch_of_group.setdefault(group_id, url)) != url:
                self._find(group_id, f"is in {first} and in {url}")
        try:
            issued = read_issue(self._store, self._run, ref.step).groups
        except (FileNotFoundError, ManifestError):
            return
        for group_id in sorted(groups - {group.group_id for group in issued}):
            self._find(group_id, f"is in {url} but was never issued")
        for group in issued:
            if not group.continues:
                continue
            first = self._continued.setdefault(group.continues, group.group_id)
            if first != group.group_id:
                self._find(group.continues, f"goes on as {first} and as {group.group_id}")
            if trained := self._batch_of_group.get(group.continues):
                self._find(group.continues, f"goes on as {group.group_id} but is in {trained}")

    def _check_rising(self, values: dict[str, int], what: str) -> None:
        highest = 0
        for url, value in values.items():
            if value < highest:
                self._find(url, f"{what} {value} after {highest}")
            highest = max(highest, value)

    def _read(self, read: Callable[[], T], url: str = "", folder: str = "") -> T | None:
        """Give what is read, or None after taking down why it cannot be."""
        try:
            return read()
        except ManifestError as error:
            self._damage(error, folder)
        except FileNotFoundError:
            self._find(url, "no such object")
        return None

    def _damage(self, error: ManifestError, folder: str) -> None:
        self._find(error.name, f"expected {error.expected}, found {error.found}")
        if folder:
            self._damaged_folders.add(folder)

    def _find(self, name: str, reason: str) -> None:
        self.findings.append(Finding(name, reason))
