"""Processes that run one plain reward function, each call with a deadline.

A function may hang, raise, fork, fill memory or print without end: its process is ended with all of
its group, and only the call that did it is lost. While a call is slow another process takes its
place, so that one that hangs holds nobody up; where nothing but hanging is seen, what waits fails
at once instead of hanging in its turn.
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any

START_TIMEOUT_S = 60.0
SLOW_S = 1.0
"""Seconds after which a call's place is given to another process."""
SPARE = 4
"""Processes at most, for each place."""
ANSWER_BYTES = 1 << 20
"""No answer is longer."""


class GradeError(RuntimeError):
    """A call gave no reward; the message says why."""


class GradeTimeoutError(GradeError):
    """A call was over its deadline, or would have waited in vain."""


class RewardPool:
    """``places`` calls at a time of the reward function ``path``."""

    def __init__(self, path: str, places: int, memory_bytes: int) -> None:
        self._setup = {"path": path, "sys_path": list(sys.path), "memory_bytes": memory_bytes}
        self._places = asyncio.Semaphore(places)
        self._all = asyncio.Semaphore(places * SPARE)
        self._hanging_limit = max(2, places)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ended: list[_Worker] = []
        """Killed, perhaps not gone yet."""
        self._hung = 0
        """Calls in a row that were over their deadline."""
        self._try_again = 0.0

    async def start(self, processes: int = 1) -> None:
        """Have processes ready; GradeError where the function cannot be loaded in one."""
        workers = [_Worker() for _ in range(processes)]
        await asyncio.gather(*(worker.start(self._setup) for worker in workers))
        self._idle += workers

    async def call(self, argument: Any, timeout_s: float) -> list[tuple[float, dict[str, float]]]:
        """Score one sample, or a sequence of samples together; (reward, parts) of each.

        GradeTimeoutError after ``timeout_s`` seconds of computing; GradeError where the function
        raised or its process died.
        """
        held = await self._place()
        worker: _Worker | None = None
        try:
            if self._hung >= self._hanging_limit and time.monotonic() < self._try_again:
                raise GradeTimeoutError(
                    f"not called: {self._hanging_limit} calls in a row took over {timeout_s:g} s"
                )
            worker = await self._worker()
            started = time.monotonic()
            asking = asyncio.ensure_future(worker.ask([argument]))
            done, _ = await asyncio.wait({asking}, timeout=min(SLOW_S, timeout_s))
            if not done:
                held.give_place()
            answer = await asyncio.wait_for(
                asking, max(0.0, timeout_s - time.monotonic() + started)
            )
        except TimeoutError:
            self._hung += 1
            self._try_again = time.monotonic() + timeout_s
            raise GradeTimeoutError(f"no reward within {timeout_s:g} s") from None
        else:
            self._hung = 0
            self._idle.append(worker)
            self._busy.discard(worker)
            worker = None
        finally:
            if worker is not None:
                self._busy.discard(worker)
                self._end(worker)
            held.give_all()
        if "error" in answer:
            raise GradeError(f"reward function raised {answer['error']}")
        return [(reward, parts) for reward, parts in answer["rewards"]]

    async def stop(self) -> None:
        """End every process; none is left when this returns."""
        for worker in [*self._idle, *self._busy]:
            self._end(worker)
        self._idle.clear()
        self._busy.clear()
        await asyncio.gather(*(worker.gone() for worker in self._ended))

    def _end(self, worker: "_Worker") -> None:
        worker.kill()
        self._ended = [w for w in self._ended if w.alive] + [worker]

    async def _place(self) -> "_Held":
        await self._all.acquire()
        try:
            await self._places.acquire()
        except BaseException:
            self._all.release()
            raise
        return _Held(self._places, self._all)

    async def _worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                self._busy.add(worker)
                return worker
            self._end(worker)
        worker = _Worker()
        self._busy.add(worker)
        await worker.start(self._setup)
        return worker


class _Held:
    """A call's place, which it gives up early when it is slow."""

    def __init__(self, places: asyncio.Semaphore, everything: asyncio.Semaphore) -> None:
        self._places: asyncio.Semaphore | None = places
        self._everything = everything

    def give_place(self) -> None:
        if self._places is not None:
            self._places.release()
            self._places = None

    def give_all(self) -> None:
        self.give_place()
        self._everything.release()


class _Worker:
    """One process, the leader of its own group."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Future[asyncio.subprocess.Process] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, setup: dict[str, Any]) -> None:
        self._starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rollflow.engines.rollout.reward_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                limit=ANSWER_BYTES,
            )
        )
        # Whoever gives up on a start must still find the process.
        self._process = await asyncio.shield(self._starting)
        try:
            await asyncio.wait_for(self._exchange(setup), START_TIMEOUT_S)
        except TimeoutError:
            raise GradeError(f"{setup['path']} was not loaded in {START_TIMEOUT_S:g} s") from None

    async def ask(self, arguments: Sequence[Any]) -> dict[str, Any]:
        return await self._exchange(list(arguments))

    async def gone(self) -> None:
        if self._process is None and self._starting is not None:
            self._process = await self._starting
            self.kill()
        if self._process is not None:
            await self._process.communicate()

    def kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _exchange(self, request: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        data = pickle.dumps(request)
        try:
            process.stdin.write(struct.pack("<Q", len(data)) + data)
            await process.stdin.drain()
            line = await process.stdout.readline()
        except (ConnectionError, ValueError) as error:
            raise GradeError(f"the reward function's process is not to be used: {error}") from error
        if not line.endswith(b"\n"):
            code = await process.wait()
            raise GradeError(f"the reward function's process died with exit code {code}")
        return json.loads(line)
