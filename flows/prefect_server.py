"""``python -m rollflow.flows.prefect_server server start ...``: Prefect's command line, on SQLite to be relied on.

Prefect 3.8.8 begins its transactions without the right to write and asks for it after it has read. SQLite
refuses that at once where anything was written in between: a request is answered with status 503, and an
automation's count is given up after four tries, so that a run that ended is taken for dead. Here every
transaction that Prefect announces asks for the right before it reads, and waits for it. PostgreSQL is not
concerned.

A new database is a copy of an empty one that this user's first server made: Prefect makes one by
more than a hundred migrations, which take longer than all the rest of its start.
"""

import asyncio
import contextlib
import functools
import inspect
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import platformdirs
import prefect
from prefect.cli import app
from prefect.server.database import provide_database_interface
from prefect.server.database.interface import PrefectDBInterface
from prefect.settings import get_current_settings
from sqlalchemy.ext.asyncio import AsyncSession

_session_context = PrefectDBInterface.session_context


@functools.wraps(_session_context)
def _writing(
    self: PrefectDBInterface, begin_transaction: bool = False, with_for_update: bool = False
) -> AbstractAsyncContextManager[AsyncSession]:
    return _session_context(self, begin_transaction, with_for_update or begin_transaction)


def main() -> None:
    """Run Prefect's command line.

    Raises:
        RuntimeError: this Prefect begins transactions in another way than the one that was looked at.
    """
    if "with_for_update" not in inspect.signature(_session_context).parameters:
        raise RuntimeError(
            f"Prefect {prefect.__version__}: PrefectDBInterface.session_context takes no with_for_update; "
            "install 3.8.8"
        )
    setattr(PrefectDBInterface, "session_context", _writing)  # noqa: B010 - not meant to be replaced
    if sys.argv[1:3] == ["server", "start"]:
        lay_database()
    app()


def lay_database() -> None:
    """Put an empty database of this version where Prefect's default one is missing."""
    settings = get_current_settings()
    database = settings.home / "prefect.db"
    wanted = settings.server.database.connection_url
    if (
        database.exists()
        or wanted is None
        or not wanted.get_secret_value().endswith(f"/{database}")
    ):
        return
    empty = platformdirs.user_cache_path("rollflow") / f"prefect-{prefect.__version__}.db"
    if empty.exists():
        _appear(lambda file: shutil.copyfile(empty, file), database)
        return
    asyncio.run(provide_database_interface().create_db())
    # Where the cache cannot be written the next start takes as long.
    with contextlib.suppress(OSError):
        empty.parent.mkdir(parents=True, exist_ok=True)
        _appear(lambda file: _copy(database, file), empty)


def _copy(database: Path, file: Path) -> None:
    """Copy a database with what is only in its log yet."""
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(file)) as target,
    ):
        source.backup(target)


def _appear(write: Callable[[Path], object], file: Path) -> None:
    """Have ``write`` make ``file``, which is seen whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
