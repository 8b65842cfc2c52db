"""The name of a group that waits in the data buffer. Nothing heavy is imported here: hooks get such names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A group that waits, e.g. ``Kept("000007/train.jsonl:3", 7, "train.jsonl:3", 6, "cut")``."""

    group_id: str
    """Its name in the step that began it."""
    step: int
    prompt_id: str
    oldest_version: int | None
    """Of all its tokens; None where there is none, so that only its prompt waits."""
    reason: str
