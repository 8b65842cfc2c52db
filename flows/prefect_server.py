"""``python -m rollflow.flows.prefect_server server start ...``: Prefect's command line, on SQLite to be relied on.

Prefect 3.8.8 reads an automation's count and then writes it in one deferred transaction. SQLite
refuses the write at once where anything else was written in between; after four such refusals the
event is dropped, and a run that ended is taken for dead, or a dead one is left alone. Here such a
transaction asks for the right to write before it reads, and waits for it. PostgreSQL is not concerned.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import prefect
from prefect.cli import app
from prefect.server.database import provide_database_interface
from prefect.server.events import triggers
from sqlalchemy.ext.asyncio import AsyncSession


@asynccontextmanager
async def _writing(begin_transaction: bool = True) -> AsyncIterator[AsyncSession]:
    """In place of ``automations_session`` of the module that counts events."""
    database = provide_database_interface()
    async with database.session_context(begin_transaction=True, with_for_update=True) as session:
        yield session


def main() -> None:
    """Run Prefect's command line.

    Raises:
        RuntimeError: this Prefect counts events in another way than the one that was looked at.
    """
    if not hasattr(triggers, "automations_session"):
        raise RuntimeError(
            f"Prefect {prefect.__version__} has no prefect.server.events.triggers.automations_session; "
            "install 3.8.8"
        )
    setattr(triggers, "automations_session", _writing)  # noqa: B010 - not exported
    app()


if __name__ == "__main__":
    main()
