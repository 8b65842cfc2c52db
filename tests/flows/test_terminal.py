"""What commands print: to a reader that is gone, and at Ctrl-C."""

import os
from contextlib import suppress

import pytest

from rollflow.flows import cli, server
from rollflow.flows import train as training
from rollflow.flows.progress import ending
from rollflow.flows.terminal import Unbreakable
from rollflow.tasks import checks


def test_a_flow_outlives_the_reader_of_its_output():
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    with pytest.raises(BrokenPipeError):
        stream.write("a line\n")
    survivor = Unbreakable(stream)
    print("a line", file=survivor, flush=True)
    assert survivor.encoding == stream.encoding
    with suppress(BrokenPipeError):  # what was never read is given up
        stream.close()


@pytest.mark.parametrize(("store", "where"), [(".rollflow/store", ""), ("/x", " --store /x")])
def test_a_run_that_is_interrupted_says_the_command_that_goes_on(monkeypatch, capsys, store, where):
    async def interrupted(config):
        raise KeyboardInterrupt

    for module, name, stand_in in (
        (checks, "check_settings", lambda config: None),
        (server, "use_server", lambda: ""),
        (training, "train", interrupted),
    ):
        monkeypatch.setattr(module, name, stand_in)
    with pytest.raises(KeyboardInterrupt):
        cli.train("arithmetic_cpu", "--name", "mine", "--store.url", store)
    assert (
        capsys.readouterr().err
        == f"the same command, or `rollflow resume mine{where}`, goes on from the log\n"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "ended"),
        (KeyboardInterrupt(), "cancelled"),
        (ValueError("no such file"), "failed: no such file"),
        (AssertionError(), "failed: AssertionError"),
    ],
)
def test_a_flow_says_how_it_ended(error, said):
    assert ending(error) == said
