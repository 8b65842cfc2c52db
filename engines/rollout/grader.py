"""Scores samples with a user's reward function, on threads or on the event loop, with a deadline."""

import asyncio
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

from rollflow.engines.hooks import Reward, RewardFn, hook_version, is_async, load_hook, parse_reward
from rollflow.storage.samples import Sample, Status

THREADS = 16


class Grader:
    """One reward function, ``pkg.mod:fn``."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._function: RewardFn = load_hook(path, "reward")
        self._version = hook_version(path)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reward")

    async def score(self, sample: Sample) -> Sample:
        """The sample with its reward. A failed one stays as it is; whatever the function raises or
        a reward that is late makes the sample failed, with the reason in ``metadata["error"]``."""
        if sample.status is Status.FAILED:
            return sample
        started = time.monotonic()
        try:
            result = await asyncio.wait_for(self._call(sample), self._timeout_s)
            reward, parts = parse_reward(result)
        except TimeoutError:
            return failed(sample, f"no reward within {self._timeout_s:g} s", self._version)
        except Exception as error:  # noqa: BLE001 - the function is the user's: it may raise anything
            return failed(sample, f"reward function raised {error!r}", self._version)
        return replace(
            sample,
            reward=reward,
            reward_parts=parts,
            grader=self._version,
            score_s=time.monotonic() - started,
        )

    async def _call(self, sample: Sample) -> Reward:
        if is_async(self._function):
            return await cast(Awaitable[Reward], self._function(sample))
        loop = asyncio.get_running_loop()
        return cast(Any, await loop.run_in_executor(self._threads, self._function, sample))


def failed(sample: Sample, error: str, grader: str = "") -> Sample:
    """The sample as a failed one: without reward, with the reason."""
    return replace(
        sample,
        status=Status.FAILED,
        reward=None,
        reward_parts={},
        grader=grader,
        metadata={**sample.metadata, "error": error},
    )
