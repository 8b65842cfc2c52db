"""Scores samples with a user's reward function, each call with a deadline and bounded retries."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, cast

from rollflow.engines.hooks import Reward, hook_version, is_async, load_hook, parse_reward
from rollflow.storage.samples import Sample, Status

from .reward_pool import GradeError, GradeTimeoutError, RewardPool

FIRST_PAUSE_S = 0.1
Score = tuple[float, dict[str, float]]


class Grader:
    """One reward function, ``pkg.mod:fn``.

    A plain function runs in processes of its own, ``workers`` at a time, each with at most
    ``memory_bytes`` of address space; an ``async`` one on an event loop of its own. With ``group``
    the function is given all samples of a group and returns a reward for each.
    """

    def __init__(
        self,
        path: str,
        timeout_s: float,
        *,
        retries: int = 0,
        workers: int = 2,
        memory_bytes: int = 4 << 30,
        group: bool = False,
    ) -> None:
        self._function = load_hook(path, "group_reward" if group else "reward")
        self._version = hook_version(path)
        self._timeout_s = timeout_s
        self._retries = retries
        self._group = group
        self._pool: RewardPool | None = None
        self._loop: _LoopThread | None = None
        if not is_async(self._function):
            self._pool = RewardPool(path, workers, memory_bytes)

    async def start(self) -> None:
        """Have a process ready before the first sample is; GradeError where it cannot be."""
        if self._pool is not None:
            await self._pool.start()

    async def stop(self) -> None:
        """End the processes and the event loop."""
        if self._pool is not None:
            await self._pool.stop()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    async def score_group(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their rewards. Failed ones stay as they are and are shown to no function;
        where the function raises, is late or gives no number, the sample becomes failed, with the
        reason in ``metadata["error"]``."""
        if not self._group:
            return list(await asyncio.gather(*(self.score(sample) for sample in samples)))
        whole = [sample for sample in samples if sample.status is not Status.FAILED]
        if not whole or all(s.reward is not None for s in whole):
            return list(samples)
        scored = iter(await self._score(whole, whole))
        return [s if s.status is Status.FAILED else next(scored) for s in samples]

    async def score(self, sample: Sample) -> Sample:
        """One sample with its reward; one that has it, or has failed, stays as it is."""
        if sample.status is Status.FAILED or sample.reward is not None:
            return sample
        [scored] = await self._score(sample, [sample])
        return scored

    async def _score(self, argument: Sample | list[Sample], samples: list[Sample]) -> list[Sample]:
        started = time.monotonic()
        try:
            scores = await self._tried(argument, started + self._timeout_s)
        except GradeError as error:
            return [failed(sample, str(error), self._version) for sample in samples]
        seconds = time.monotonic() - started
        return [
            replace(s, reward=reward, reward_parts=parts, grader=self._version, score_s=seconds)
            for s, (reward, parts) in zip(samples, scores, strict=True)
        ]

    async def _tried(self, argument: Any, deadline: float) -> list[Score]:
        """Call, and call again after a fault; a time-out is final: the step waits for it once."""
        for attempt in range(self._retries + 1):
            try:
                return await self._call(argument)
            except GradeTimeoutError:
                raise
            except GradeError:
                pause = FIRST_PAUSE_S * 2**attempt
                if attempt == self._retries or time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _call(self, argument: Any) -> list[Score]:
        if self._pool is not None:
            return await self._pool.call(argument, self._timeout_s)
        if self._loop is None or not self._loop.answers:
            self._loop = _LoopThread()
        call = self._function(argument)
        try:
            result = await self._loop.run(cast(Awaitable[Any], call), self._timeout_s)
            rewards = list(cast(Sequence[Reward], result)) if self._group else [result]
            if self._group and len(rewards) != len(argument):
                raise ValueError(
                    f"reward function returned {len(rewards)} rewards for {len(argument)} samples"
                )
            return [parse_reward(reward) for reward in rewards]
        except TimeoutError:
            raise GradeTimeoutError(f"no reward within {self._timeout_s:g} s") from None
        except Exception as error:
            raise GradeError(f"reward function raised {error!r}") from error


class _LoopThread:
    """An event loop beside the engine's: a function that blocks it blocks nothing else."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        self.answers = True
        """False once a call left the loop blocked: another loop has to be used."""

    async def run(self, call: Awaitable[Any], timeout_s: float) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(call, timeout_s)

        future = asyncio.run_coroutine_threadsafe(
            cast(Coroutine[Any, Any, Any], bounded()), self._loop
        )
        # A little later than the loop's own deadline: only a blocked loop comes to this one.
        done, _ = await asyncio.wait({asyncio.wrap_future(future)}, timeout=timeout_s + 0.5)
        if not done:
            self.answers = False
            future.cancel()
            raise TimeoutError
        return done.pop().result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():  # else it is blocked, and ends with this process
            self._loop.close()


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
