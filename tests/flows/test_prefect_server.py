"""The local server's transactions on SQLite: what reads and then writes is never refused for another's write."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from rollflow.flows import prefect_server

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


class Migrations:
    """Prefect's way to make its database, seen from outside."""

    def __init__(self, database):
        self.database, self.made = database, 0

    async def create_db(self):
        self.made += 1
        with contextlib.closing(sqlite3.connect(self.database)) as made:
            made.execute("pragma journal_mode=wal")
            made.execute("create table flow (id text)")
            made.commit()


@pytest.fixture
def new_folder(tmp_path, monkeypatch):
    """Lay the database of a new folder; gives it and how often it took migrations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def lay(name, url="sqlite+aiosqlite:///{home}/prefect.db"):
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        migrations = Migrations(home / "prefect.db")
        url = SecretStr(url.format(home=home))
        settings = SimpleNamespace(
            home=home, server=SimpleNamespace(database=SimpleNamespace(connection_url=url))
        )
        monkeypatch.setattr(prefect_server, "get_current_settings", lambda: settings)
        monkeypatch.setattr(prefect_server, "provide_database_interface", lambda: migrations)
        prefect_server.lay_database()
        return migrations.database, migrations.made

    return lay


def test_only_the_first_database_of_a_user_takes_migrations(new_folder):
    databases = [new_folder(name) for name in ("one", "two", "one")]
    assert [made for _, made in databases] == [1, 0, 0]
    for database, _ in databases:
        with contextlib.closing(sqlite3.connect(database)) as read:
            assert read.execute("select name from sqlite_master").fetchall() == [("flow",)]
    assert [file.name for file in databases[1][0].parent.iterdir()] == ["prefect.db"]


def test_a_database_elsewhere_is_left_to_prefect(new_folder):
    database, made = new_folder("one", "postgresql+asyncpg://localhost/prefect")
    assert not database.exists()
    assert made == 0


def test_a_cache_that_cannot_be_written_costs_time_only(new_folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert [new_folder(name)[1] for name in ("one", "two")] == [1, 1]
