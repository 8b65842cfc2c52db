"""A batch at a glance: all rewards and three transcripts, without reading its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from .integrity import ManifestError
from .manifests import manifest_left_out, manifest_parts, read_manifest
from .objects import Store
from .refs import BatchRef

_COLUMNS = ("group_id", "index", "prompt_text", "response_text", "label", "reward", "status")


@dataclass(frozen=True, slots=True)
class Transcript:
    """One sample as a person reads it."""

    sample_id: str
    prompt: str
    response: str
    label: str
    reward: float
    status: str


@dataclass(frozen=True, slots=True)
class Glance:
    """What :func:`glance` saw."""

    rewards: list[float]
    """Of all samples that have one, ascending."""
    failed: int
    """Samples without a reward."""
    best: Transcript | None = None
    median: Transcript | None = None
    worst: Transcript | None = None
    """None where no sample has a reward."""


def glance(store: Store, ref: BatchRef) -> Glance:
    """Look at the members of a committed batch.

    Columns of tokens are not decoded, and checksums not verified: this is for showing. Of samples with
    equal rewards the first by id is shown. ManifestError where a part is missing or no Arrow file.
    """
    manifest = read_manifest(store, ref.url)
    left_out = manifest_left_out(manifest)
    rows: list[dict[str, object]] = []
    for part in manifest_parts(manifest):
        rows += _rows(store, store.join(ref.url, part.name))
    rows = [row for row in rows if row["group_id"] not in left_out]
    scored = [row for row in rows if row["reward"] is not None]
    seen = sorted((_transcript(row) for row in scored), key=lambda t: (t.reward, t.sample_id))
    if not seen:
        return Glance([], len(rows))
    return Glance(
        rewards=[t.reward for t in seen],
        failed=len(rows) - len(seen),
        best=_first_equal(seen, seen[-1].reward),
        median=_first_equal(seen, seen[len(seen) // 2].reward),
        worst=seen[0],
    )


def _rows(store: Store, url: str) -> list[dict[str, object]]:
    try:
        buffer = store.get_buffer(url)
        names = pa.ipc.open_file(pa.BufferReader(buffer)).schema.names
        wanted = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in _COLUMNS])
        return pa.ipc.open_file(pa.BufferReader(buffer), options=wanted).read_all().to_pylist()
    except FileNotFoundError as error:
        raise ManifestError(url, "a part", "no such object") from error
    except (pa.ArrowException, ValueError) as error:
        raise ManifestError(url, "an Arrow file of samples", str(error)) from error


def _transcript(row: dict[str, object]) -> Transcript:
    return Transcript(
        sample_id=f"{row['group_id']}#{row['index']}",
        prompt=str(row["prompt_text"]),
        response=str(row["response_text"]),
        label=str(row["label"] or ""),
        reward=float(str(row["reward"])),
        status=str(row["status"]),
    )


def _first_equal(seen: Sequence[Transcript], reward: float) -> Transcript:
    return next(t for t in seen if t.reward == reward)
