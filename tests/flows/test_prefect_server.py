"""The local server's transactions on SQLite: what reads and then writes is never refused for another's write."""

import os
import subprocess
import sys

INTERLEAVED = """
import asyncio, os, sqlite3, threading
from prefect.cli import app
from prefect.server.database import provide_database_interface
import sqlalchemy as sa
from rollflow.flows import prefect_server

path = os.environ["DATABASE"]
with sqlite3.connect(path) as made:
    made.execute("pragma journal_mode=wal")
    made.execute("create table counts (n integer)")
    made.execute("insert into counts values (0)")

def other():
    with sqlite3.connect(path, timeout=20) as connection:
        connection.execute("update counts set n = n + 10")

async def count():
    async with provide_database_interface().session_context(begin_transaction=True) as session:
        [[n]] = await session.execute(sa.text("select n from counts"))
        writer = threading.Thread(target=other)
        writer.start()
        await asyncio.to_thread(writer.join, 1.0)  # it has written by now, or waits for us
        await session.execute(sa.text(f"update counts set n = {n} + 1"))
    writer.join()

def command():
    asyncio.run(count())
    print(sqlite3.connect(path).execute("select n from counts").fetchone()[0])

if MENDED:
    prefect_server.app = command
    prefect_server.main()
else:
    command()
"""


def interleaved(folder, *, mended):
    path = folder / "prefect.db"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}",
        "DATABASE": str(path),
    }
    program = f"MENDED = {mended}\n{INTERLEAVED}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_transaction_that_reads_first_may_write_although_another_wrote_meanwhile(tmp_path):
    done = interleaved(tmp_path, mended=True)
    assert done.stdout.splitlines()[-1:] == ["11"], done.stderr


def test_prefect_alone_refuses_it(tmp_path):
    assert "database is locked" in interleaved(tmp_path, mended=False).stderr
