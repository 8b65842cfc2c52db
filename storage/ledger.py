"""What became of every prompt: issued before generation, durable in parts, consumed by a step."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from .integrity import ManifestError, Record, seal, unseal
from .lease import check_fence
from .manifests import ISSUED, batch_folder, batch_steps, find_batch
from .objects import Store
from .refs import RunRef
from .samples import Sample, Status
from .schema import from_table
from .shards import MANIFEST, Part, part_names, read_loose_part
from .steps import step_numbers

FORMAT = "rollflow.issue/1"


class PromptStatus(StrEnum):
    """How far a prompt of a step has come. What is only issued is issued again after a crash."""

    ISSUED = "issued"
    COMPLETED = "completed"
    """All its samples are durable."""
    CONSUMED = "consumed"
    """The step that trained on them is committed."""


@dataclass(frozen=True, slots=True)
class IssuedGroup:
    """A group to generate, e.g. ``IssuedGroup("000012/train.jsonl:7", "train.jsonl:7", 2, (5, 9))``."""

    group_id: str
    prompt_id: str
    samples: int
    """Executions of the generate function; each may yield several samples."""
    seeds: tuple[int, ...]
    """One each, in order of index."""
    continues: str = ""
    """The group of an earlier step that was put back and goes on here; empty for a new one."""


@dataclass(frozen=True, slots=True)
class Issue:
    """What ``rollouts/step-000012/issued.json`` holds."""

    run: RunRef
    step: int
    epoch: int
    """Fencing epoch that issued it first."""
    policy_version: int
    groups: tuple[IssuedGroup, ...]
    waves: int = 1
    """How many times the step was given groups."""
    cursors: dict[str, int] = field(default_factory=dict[str, int])
    """How far each source of prompts was drawn afterwards, by name."""


@dataclass(frozen=True, slots=True)
class Durable:
    """What of an uncommitted step survived its writers."""

    parts: list[tuple[Part, list[Sample]]] = field(default_factory=list)
    """Intact parts, the oldest first, each with the complete groups to take from it."""
    missing: list[IssuedGroup] = field(default_factory=list)
    """Issued groups that no part holds whole: to be generated."""
    cut: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])
    """Issued groups of which some samples were cut off: to be continued."""
    skipped: list[ManifestError] = field(default_factory=list)
    """Parts that are torn or not of this step, by name and reason."""

    @property
    def samples(self) -> list[Sample]:
        """All samples to take, every issued group at most once."""
        return [sample for _, samples in self.parts for sample in samples]


@dataclass(frozen=True, slots=True)
class PromptState:
    """How far one issued group has come."""

    step: int
    group_id: str
    prompt_id: str
    status: PromptStatus


def issue(
    store: Store,
    run: RunRef,
    step: int,
    groups: Sequence[IssuedGroup],
    policy_version: int,
    *,
    wave: int = 0,
    cursors: Mapping[str, int] | None = None,
) -> Issue:
    """Write down which groups a step generates, before it does; give what stands of all waves.

    A wave that was issued before, by whatever epoch, stays as it is: the same prompts, seeds and
    policy version. ``cursors`` tell how far sources were drawn. ValueError where ``groups`` are no sound plan; LeaseLostError where the epoch of
    ``run`` is over; ManifestError where what stands is damaged.
    """
    _check_plan(groups)
    record: Record = {
        "format": FORMAT,
        "run": run.name,
        "epoch": run.epoch,
        "step": step,
        "policy_version": policy_version,
        "groups": [{**asdict(group), "seeds": list(group.seeds)} for group in groups],
        "cursors": dict(cursors or {}),
        "issued_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    check_fence(store, run)
    with suppress(FileExistsError):
        store.put_new(_url(run, step, wave), seal(record))
    return read_issue(store, run, step)


def read_issue(store: Store, run: RunRef, step: int) -> Issue:
    """Read what a step was given, verified; FileNotFoundError where nothing was issued."""
    folder = batch_folder(run, step)
    waves = len([name for name in store.children(folder) if ISSUED.fullmatch(name)])
    records = [_read_wave(store, run, step, wave) for wave in range(max(waves, 1))]
    groups = [
        IssuedGroup(**{**g, "seeds": tuple(g["seeds"])}) for r in records for g in r["groups"]
    ]
    cursors: dict[str, int] = {}
    for record in records:
        cursors.update(record.get("cursors", {}))
    _check_plan(groups)
    first = records[0]
    return Issue(
        run, step, first["epoch"], first["policy_version"], tuple(groups), len(records), cursors
    )


def durable_groups(store: Store, run: RunRef, step: int) -> Durable:
    """Find what of an uncommitted step need not be generated again, whichever epoch wrote it.

    Take it by appending ``samples`` to the step's own ``ShardWriter`` and generate ``missing``: so
    every group enters the new manifest once, in a part of the writer that commits it, and the old
    parts are cleared away by the commit. A group that stands in several parts is taken from the
    oldest; one that no part holds whole is missing. FileNotFoundError where nothing was issued;
    ManifestError where the step is committed, or its issue is damaged.
    """
    folder = batch_folder(run, step)
    if store.exists(manifest := store.join(folder, MANIFEST)):
        raise ManifestError(manifest, "no such object", "a committed batch")
    groups = read_issue(store, run, step).groups
    missing = {group.group_id: group for group in groups}
    issued = dict(missing)
    durable = Durable()
    cut: dict[str, list[Sample]] = {}
    for name in part_names(store, folder):
        try:
            part, table = read_loose_part(store, folder, name)
            samples = _own_samples(store.join(folder, name), run, step, issued, from_table(table))
        except ManifestError as error:
            durable.skipped.append(error)
            continue
        taken: list[Sample] = []
        for group_id, members in _by_group(samples).items():
            if group_id in missing and _is_whole(missing[group_id], members):
                if any(sample.status is Status.ABORTED for sample in members):
                    cut[group_id] = members
                    continue
                del missing[group_id]
                taken += members
        durable.parts.append((part, taken))
    durable.cut.update({k: v for k, v in cut.items() if k in missing})
    durable.missing.extend(group for k, group in missing.items() if k not in durable.cut)
    return durable


def prompt_states(store: Store, run: RunRef) -> list[PromptState]:
    """Tell of every group that was ever issued how far it has come, in order of step."""
    consumed = set(step_numbers(store, run))
    states: list[PromptState] = []
    for step in batch_steps(store, run):
        try:
            groups = read_issue(store, run, step).groups
        except FileNotFoundError:
            continue
        status = PromptStatus.CONSUMED if step in consumed else PromptStatus.COMPLETED
        missing: set[str] = set()
        if find_batch(store, run, step) is None:
            durable = durable_groups(store, run, step)
            missing = {group.group_id for group in durable.missing} | set(durable.cut)
        states += [
            PromptState(
                step, g.group_id, g.prompt_id,
                PromptStatus.ISSUED if g.group_id in missing else status,
            )
            for g in groups
        ]  # fmt: skip
    return states


def _check_plan(groups: Sequence[IssuedGroup]) -> None:
    seen: set[str] = set()
    for group in groups:
        if group.group_id in seen:
            raise ValueError(f"group {group.group_id} is issued twice; give every group its own id")
        seen.add(group.group_id)
        if len(group.seeds) != group.samples or group.samples < 1:
            raise ValueError(
                f"group {group.group_id}: {len(group.seeds)} seeds for {group.samples} samples; "
                "give one seed each, and one sample at least"
            )


def _own_samples(
    url: str, run: RunRef, step: int, issued: dict[str, IssuedGroup], samples: list[Sample]
) -> list[Sample]:
    """Refuse a part with any sample that this step did not ask for."""
    for sample in samples:
        group = issued.get(sample.group_id)
        if (sample.run, sample.step) != (run.name, step) or group is None:
            found = f"{sample.sample_id} of step {sample.step} of run {sample.run!r}"
            raise ManifestError(url, f"groups issued for step {step}", found)
        if sample.prompt_id != group.prompt_id:
            raise ManifestError(
                url, f"prompt {group.prompt_id} in group {group.group_id}", sample.prompt_id
            )
    return samples


def _by_group(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    return groups


def _is_whole(group: IssuedGroup, samples: Sequence[Sample]) -> bool:
    indices = sorted(sample.index for sample in samples)
    return (
        indices == list(range(len(indices)))
        and len(indices) >= group.samples
        and {sample.seed for sample in samples} == set(group.seeds)
    )


def _read_wave(store: Store, run: RunRef, step: int, wave: int) -> Record:
    url = _url(run, step, wave)
    record = unseal(store.get(url), url, FORMAT)
    if (record["run"], record["step"]) != (run.name, step):
        found = f"the one of step {record['step']} of run {record['run']!r}"
        raise ManifestError(url, "the issue of that step", found)
    return record


def _url(run: RunRef, step: int, wave: int) -> str:
    name = f"issued-{wave:04d}.json" if wave else "issued.json"
    return f"{batch_folder(run, step)}/{name}"
