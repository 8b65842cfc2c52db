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
    """Make a function the task ``name`` of an iteration, which :func:`told` may leave out.

    Prefect is given the call as one thing: in arguments it looks for results of other tasks, through every
    field of every setting, twice.
    """

    def decorate(fn: Step[P, R]) -> Step[P, R]:
        async def run(call: Callable[[], Coroutine[Any, Any, R]]) -> R:
            return await call()

        run.__name__, run.__qualname__, run.__doc__ = fn.__name__, fn.__qualname__, fn.__doc__
        made = task(name=name, cache_policy=NO_CACHE)(run)

        @functools.wraps(fn)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _told.get():
                return await fn(*args, **kwargs)
            return await made(functools.partial(fn, *args, **kwargs))

        return call

    return decorate
