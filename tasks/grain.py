"""How much of an iteration Prefect is told: its tasks, or nothing of steps between."""

import functools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[P, Coroutine[Any, Any, R]]
_told: ContextVar[bool] = ContextVar("told", default=True)


@contextmanager
def told(yes: bool) -> Iterator[None]:
    """Inside the block the tasks of an iteration are Prefect tasks, or plain calls.

    Each task run leaves about 20 KB of events for as long as the server keeps events, and 3 KB for good.
    """
    token = _told.set(yes)
    try:
        yield
    finally:
        _told.reset(token)


def step_task(name: str) -> Callable[[Step[P, R]], Step[P, R]]:
    """Make a function the task ``name`` of an iteration, which :func:`told` may leave out."""

    def decorate(fn: Step[P, R]) -> Step[P, R]:
        made = task(name=name, cache_policy=NO_CACHE)(fn)

        @functools.wraps(fn)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return await (made if _told.get() else fn)(*args, **kwargs)

        return call

    return decorate
