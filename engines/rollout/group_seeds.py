"""A seed for each sample of a group that goes to a server as one request.

The router passes one set of sampling parameters for all prompts of a request, so seeds travel beside
them, in a field that it passes as it is and that servers have for the labels of their metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rollflow.engines.gpu.server_answers import OURS

FIELD = "custom_labels"
SEEDS = "rollflow_seeds"


def labels_of(seeds: Sequence[int]) -> dict[str, str]:
    """What :data:`FIELD` of a request is, for the seeds of its prompts."""
    return {SEEDS: " ".join(map(str, seeds))}


def install() -> None:
    """In a server's process, before it is launched: give each prompt of such a request its own seed."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    normalize = GenerateReqInput.normalize_batch_and_arguments

    def normalize_with_seeds(self: Any) -> None:
        ours = isinstance(self.rid, str) and self.rid.startswith(OURS)
        if not (ours and self.input_ids and isinstance(self.input_ids[0], list)):
            normalize(self)
            return
        seeds, self.custom_labels = seeds_of(self.custom_labels), None
        if len(seeds) != len(self.input_ids):
            raise ValueError(f"{self.rid}: {len(seeds)} seeds for {len(self.input_ids)} prompts")
        self.sampling_params = [{**self.sampling_params, "sampling_seed": seed} for seed in seeds]
        normalize(self)

    GenerateReqInput.normalize_batch_and_arguments = normalize_with_seeds


def seeds_of(labels: Mapping[str, str] | None) -> list[int]:
    """What :func:`labels_of` made the labels of; none of others' labels."""
    return [int(seed) for seed in (labels or {}).get(SEEDS, "").split()]
