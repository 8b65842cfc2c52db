"""Commands that ask a Prefect server start none, and say which one does not answer."""

import pytest

from rollflow.flows import cli_operate, server
from rollflow.storage.runs import RunNotFound


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [cli_operate.pause, cli_operate.cancel])
def test_without_a_server_none_is_started(command, empty_folder):
    with pytest.raises(RuntimeError, match="no Prefect server runs in this folder; `rollflow up`"):
        command("nobody")
    assert list(empty_folder.iterdir()) == []


def test_a_server_elsewhere_that_does_not_answer_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(server, "ELSEWHERE_S", 0.1)
    for command in (lambda: cli_operate.pause("nobody"), lambda: cli_operate.up()):
        with pytest.raises(
            RuntimeError, match=r"PREFECT_API_URL = http://127\.0\.0\.1:9/api: no Prefect"
        ):
            command()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_record_of_the_server_that_cannot_be_read_is_none(text, empty_folder):
    (empty_folder / server.HOME).mkdir(parents=True)
    (empty_folder / server.HOME / "server.json").write_text(text)
    assert server.running() is None
    assert server.stop() is False


def test_only_a_stored_run_is_evaluated_by_the_clock():
    with pytest.raises(RunNotFound, match="nosuchrun"):
        cli_operate.schedule("evaluate", "nosuchrun", cron="0 * * * *")
