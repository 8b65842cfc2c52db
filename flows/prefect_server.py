"""``python -m rollflow.flows.prefect_server server start ...``: Prefect's command line, on SQLite to be relied on.

Prefect 3.8.8 begins its transactions without the right to write and asks for it after it has read. SQLite
refuses that at once where anything was written in between: a request is answered with status 503, and an
automation's count is given up after four tries, so that a run that ended is taken for dead. Here every
transaction that Prefect announces asks for the right before it reads, and waits for it. PostgreSQL is not
concerned.
"""

import functools
import inspect
from contextlib import AbstractAsyncContextManager

import prefect
from prefect.cli import app
from prefect.server.database.interface import PrefectDBInterface
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
    app()


if __name__ == "__main__":
    main()
