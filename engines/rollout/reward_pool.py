"""Processes that run one plain reward function, each call with a deadline.

A function may hang, raise, fork, fill memory or print without end: its process is ended with all of
its group, and only the call that did it is lost. While a call is slow another process takes its
place, so that one that hangs holds nobody up; where nothing but hanging is seen, what waits fails
at once instead of hanging in its turn. Calls that prove to be quick go to a process several at a
time, for a message takes longer than they do; those behind a slow one are made again by another.
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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

START_TIMEOUT_S = 60.0
SLOW_S = 1.0
"""Seconds after which a call's place is given to another process."""
SPARE = 4
"""Processes at most, for each place."""
MESSAGE_S = 0.01
"""Seconds that the calls of one message may take, if they are as the last ones were,"""
MESSAGE_CALLS = 16
"""and how many they are at most."""
STOPPED = "the reward function's processes were ended"
ANSWER_BYTES = 1 << 20
"""No answer is longer."""


class GradeError(RuntimeError):
    """A call gave no reward; the message says why."""


class GradeTimeoutError(GradeError):
    """A call was over its deadline, or would have waited in vain."""


@dataclass(slots=True, eq=False)
class _Call:
    argument: bytes
    """Pickled by itself: what a function changes in it is nobody else's."""
    timeout_s: float
    answer: asyncio.Future[dict[str, Any]]


class RewardPool:
    """Processes with the reward function ``path``, of which ``places`` compute at a time."""

    def __init__(self, path: str, places: int, memory_bytes: int) -> None:
        self._setup = {"path": path, "sys_path": list(sys.path), "memory_bytes": memory_bytes}
        self._places = places
        self._waiting: deque[_Call] = deque()
        self._serving: set[asyncio.Task[None]] = set()
        self._slow: set[asyncio.Task[None]] = set()
        """Those of them that gave their place to another."""
        self._call_s = MESSAGE_S
        """What a call took lately."""
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ended: list[_Worker] = []
        """Killed, perhaps not gone yet."""
        self._hung = 0
        """Calls in a row that were over their deadline."""
        self._try_again = 0.0
        self._stopped = False

    async def start(self, processes: int = 1) -> None:
        """Have processes ready; GradeError where the function cannot be loaded in one."""
        workers = [_Worker() for _ in range(processes)]
        await asyncio.gather(*(worker.start(self._setup) for worker in workers))
        self._idle += workers

    async def call(self, argument: Any, timeout_s: float) -> list[tuple[float, dict[str, float]]]:
        """Score one sample, or a sequence of samples together; (reward, parts) of each.

        GradeTimeoutError after ``timeout_s`` seconds of computing; GradeError where the function
        raised, its process died or cannot be sent the samples, or the pool was stopped.
        """
        if self._stopped:
            raise GradeError(STOPPED)
        try:
            sent = pickle.dumps(argument)
        except Exception as error:
            raise GradeError(f"no process can be sent the samples: {error!r}") from error
        call = _Call(sent, timeout_s, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._serve_more()
        answer = await call.answer
        if "error" in answer:
            raise GradeError(f"reward function raised {answer['error']}")
        return [(reward, parts) for reward, parts in answer["rewards"]]

    async def stop(self) -> None:
        """End every process; none is left when this returns."""
        self._stopped = True
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        while self._waiting:
            self._blame(self._waiting.popleft(), GradeError(STOPPED))
        for worker in [*self._idle, *self._busy]:
            self._end(worker)
        self._idle.clear()
        self._busy.clear()
        await asyncio.gather(*(worker.gone() for worker in self._ended))

    def _serve_more(self) -> None:
        """Have one more process take calls, where some wait and there is a place."""
        serving = len(self._serving)
        places = min(self._places + len(self._slow), self._places * SPARE)
        if self._waiting and serving < places and not self._stopped:
            task = asyncio.create_task(self._serve())
            self._serving.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._slow.discard(task)
        self._serve_more()

    async def _serve(self) -> None:
        """Have calls answered until none waits, or one was slow: another has the place then."""
        await asyncio.sleep(0)  # what is asked at the same moment may go together
        while asyncio.current_task() not in self._slow and (calls := self._message()):
            await self._ask(calls)

    def _message(self) -> deque[_Call]:
        """The next calls to send to a process: as many as should be quick, and leave others their share."""
        quick = int(MESSAGE_S / max(self._call_s, 1e-6))
        most = max(1, min(MESSAGE_CALLS, quick, len(self._waiting) // self._places))
        calls: deque[_Call] = deque()
        while self._waiting and len(calls) < most:
            call = self._waiting.popleft()
            if not call.answer.done():  # else nobody waits for it any more
                calls.append(call)
        return calls

    async def _ask(self, calls: deque[_Call]) -> None:
        """Have a process answer ``calls``; those that it did not come to wait again."""
        worker, sent = None, len(calls)
        try:
            if self._hung >= max(2, self._places) and time.monotonic() < self._try_again:
                raise GradeTimeoutError(
                    f"not called: {self._hung} calls in a row took over {calls[0].timeout_s:g} s"
                )
            worker = await self._worker()
            started = time.monotonic()
            async with asyncio.timeout(calls[0].timeout_s):
                await worker.send([call.argument for call in calls])
            while calls:
                answer = await self._answer(worker, calls)
                self._hung = 0
                call = calls.popleft()
                if not call.answer.done():
                    call.answer.set_result(answer)
            self._call_s = max((time.monotonic() - started) / sent, self._call_s / 2)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._call_s = max(self._call_s, MESSAGE_S)
            self._blame(calls.popleft(), error)
        finally:
            self._wait_again(calls)
            if worker is not None:
                self._busy.discard(worker)
                self._idle.append(worker) if worker.owes == 0 else self._end(worker)

    def _blame(self, call: _Call, error: Exception) -> None:
        if call.answer.done():
            return  # whoever asked has gone
        if isinstance(error, TimeoutError):
            self._hung += 1
            self._try_again = time.monotonic() + call.timeout_s
            error = GradeTimeoutError(f"no reward within {call.timeout_s:g} s")
        call.answer.set_exception(error)

    async def _answer(self, worker: "_Worker", calls: deque[_Call]) -> dict[str, Any]:
        """What the process answers to the first of ``calls``; the others wait again once it is slow.

        TimeoutError or GradeError where it does not answer.
        """
        deadline = time.monotonic() + calls[0].timeout_s
        try:
            async with asyncio.timeout(min(SLOW_S, calls[0].timeout_s)):
                return await worker.answer()
        except TimeoutError:
            task = asyncio.current_task()
            assert task is not None
            self._slow.add(task)
            slow = calls.popleft()
            self._wait_again(calls)
            calls.append(slow)
            slow.answer.add_done_callback(lambda it: worker.kill() if it.cancelled() else None)
            self._serve_more()
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await worker.answer()

    def _wait_again(self, calls: deque[_Call]) -> None:
        """Before all others, in the same order."""
        self._waiting.extendleft(reversed(calls))
        calls.clear()

    def _end(self, worker: "_Worker") -> None:
        worker.kill()
        self._ended = [w for w in self._ended if not w.is_gone] + [worker]

    async def _worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                self._busy.add(worker)
                return worker
            self._end(worker)
        worker = _Worker()
        self._busy.add(worker)
        try:
            await worker.start(self._setup)
        except BaseException:
            self._busy.discard(worker)
            self._end(worker)
            raise
        return worker


class _Worker:
    """One process, the leader of its own group."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Future[asyncio.subprocess.Process] | None = None
        self.owes = 0
        """Answers that it was asked for and has not given."""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def is_gone(self) -> bool:
        return self._process is not None and self._process.returncode is not None

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
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._write(pickle.dumps(setup))
                await self._read()
        except TimeoutError:
            raise GradeError(f"{setup['path']} was not loaded in {START_TIMEOUT_S:g} s") from None

    async def send(self, arguments: Sequence[bytes]) -> None:
        """Ask for an answer to each, in their order."""
        self.owes += len(arguments)
        await self._write(pickle.dumps(list(arguments)))

    async def answer(self) -> dict[str, Any]:
        """The next answer."""
        answer = await self._read()
        self.owes -= 1
        return answer

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

    async def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack("<Q", len(data)) + data)
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise _unusable(error) from error

    async def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
        except (ConnectionError, ValueError) as error:
            raise _unusable(error) from error
        if not line.endswith(b"\n"):
            code = await self._process.wait()
            raise GradeError(f"the reward function's process died with exit code {code}")
        return json.loads(line)


def _unusable(error: Exception) -> GradeError:
    return GradeError(f"the reward function's process is not to be used: {error}")
