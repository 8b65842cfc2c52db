"""What the modules of the command line share: where they print, and the names of their options."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, TextIO

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import open_run

console = Console(soft_wrap=True)
CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
StoreUrl = Annotated[str, Parameter(help="Store that holds the runs: any fsspec URL.")]
DEFAULT_STORE = ".rollflow/store"
Words = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Settings laid over the file: --rollout-batch-size 64, --sglang-mem-fraction-static 0.5, --router-policy round_robin, --tensor-model-parallel-size 2.",
    ),
]


class Unbreakable:
    """A text stream that goes on when nobody reads it any more.

    A worker reads what its flows print. When it is killed their next word would be a BrokenPipeError,
    which must not end a training.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        with suppress(BrokenPipeError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_the_reader() -> None:
    """Let this process print into pipes whose reader may die."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Unbreakable) and not stream.isatty():
            setattr(sys, name, Unbreakable(stream))


class _Warnings(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:  # what is worse ends the command, with its message
            text = Text(f"warning: {record.getMessage()}", style="yellow")
            self._console.print(text, soft_wrap=True)


def quiet_prefect() -> None:
    """Keep Prefect's own log off the terminal. Call before Prefect is imported."""
    os.environ.setdefault(CONSOLE_LEVEL, "CRITICAL")


@contextmanager
def warnings_shown(console: Console) -> Iterator[None]:
    """While this block runs, warnings of flows and tasks are printed, unless Prefect prints them itself."""
    loggers = [logging.getLogger(f"prefect.{of}") for of in ("flow_runs", "task_runs")]
    handler = _Warnings(console)
    if os.environ.get(CONSOLE_LEVEL) == "CRITICAL":
        for logger in loggers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def opened(store_url: str, run: str) -> tuple[Store, RunRef]:
    """The store and the run in it; ``RunNotFound`` names the runs there are."""
    store = Store(StoreConfig(url=store_url))
    return store, open_run(store, run)
