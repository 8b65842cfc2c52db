"""Which tokens of a finished group are trained on; the rest stay for its statistics and the record."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rollflow.engines.hooks import load_hook
from rollflow.storage.samples import Sample

TrainedOn = Callable[[list[Sample]], list[Sample]]
"""The samples, with the loss mask as it is to be."""


def load_trained_on(sample_filter: str, mask_stale: bool) -> TrainedOn | None:
    """From the ``sample_filter`` hook and ``rollout.mask_stale``; None where neither is set."""
    if not sample_filter and not mask_stale:
        return None
    keep = load_hook(sample_filter, "sample_filter") if sample_filter else None

    def masked(samples: list[Sample]) -> list[Sample]:
        if keep is not None:
            samples = _kept(samples, keep(list(samples)), sample_filter)
        return [without_stale(sample) for sample in samples] if mask_stale else samples

    return masked


def without_stale(sample: Sample) -> Sample:
    """The sample, trained on only where the newest weights that it has tokens of made them.

    Tokens that are masked already, e.g. a tool's answer, make no others stale.
    """
    tokens = list(zip(sample.loss_mask, sample.policy_versions, strict=True))
    newest = max((version for own, version in tokens if own), default=None)
    return replace(sample, loss_mask=[own and version == newest for own, version in tokens])


def _kept(samples: list[Sample], verdicts: Sequence[bool], path: str) -> list[Sample]:
    if len(verdicts) != len(samples):
        raise ValueError(
            f"sample filter {path} gave {len(verdicts)} verdicts for {len(samples)} samples; "
            "give True or False for each"
        )
    return [
        sample
        if verdict
        else replace(
            sample,
            loss_mask=[False] * len(sample.loss_mask),
            metadata={**sample.metadata, "not_trained_on": path},
        )
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]
