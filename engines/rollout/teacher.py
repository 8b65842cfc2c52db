"""A frozen teacher: how probable it finds each token that the policy sampled."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from rollflow.storage.samples import TEACHER_LOGPROBS, Sample

from .frozen import Frozen


class Teacher:
    """Scores samples by a frozen model, which has started."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen

    async def annotate(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, each with the teacher's log-probability (nats) of each response token in
        its metadata under ``TEACHER_LOGPROBS``.

        Raises:
            GenerationError: the teacher's servers did not answer after every retry.
        """
        return await asyncio.gather(*(self._annotated(sample) for sample in samples))

    async def _annotated(self, sample: Sample) -> Sample:
        found: list[float] = []
        if sample.response_ids:
            found = await self._frozen.client.logprobs(sample.prompt_ids, sample.response_ids)
        return replace(sample, metadata={**sample.metadata, TEACHER_LOGPROBS: found})
