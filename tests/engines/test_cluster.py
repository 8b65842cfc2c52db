"""Joining a Ray that runs already, what joining leaves alone, and the programs that a private one starts."""

import contextlib
import json
import signal
import subprocess
import sys

import psutil
import pytest

from rollflow.engines import cluster, ray_agent, worker_start
from rollflow.engines.config import ClusterConfig


def test_an_address_where_no_ray_listens_is_told_at_once():
    with pytest.raises(RuntimeError, match=r"cluster\.address = '127\.0\.0\.1:9': no Ray listens"):
        cluster.connect(ClusterConfig(address="127.0.0.1:9"), "nobody")


def test_sigterm_is_left_to_whoever_has_it(monkeypatch):
    def start(config, namespace):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
        return ""

    monkeypatch.setattr(cluster, "_start", start)
    before = signal.getsignal(signal.SIGTERM)
    cluster.connect(ClusterConfig(), "test")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_ray_that_does_not_come_up_is_told_in_a_line_and_leaves_no_folder(monkeypatch, tmp_path):
    def overloaded(*_):
        raise Exception("the node timed out")

    monkeypatch.setattr(cluster, "_start_private", overloaded)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(cluster.DeadlineError, match="did not start: the node timed out"):
        cluster.connect(ClusterConfig(device="cpu"), "test")
    assert list(tmp_path.glob("*/*")) == []


@pytest.fixture
def started(tmp_path):
    """A worker by our program, as Ray would start it: what it prints, and which of the two programs became it."""
    (tmp_path / "default_worker.py").write_text(
        "import os, sys; print('worker', os.environ.get('OURS'), *sys.argv[1:])"
    )
    (tmp_path / "setup_worker.py").write_text("import sys; print('ray', *sys.argv[1:])")

    def start(language="PYTHON", **context):
        words = [
            worker_start.__file__,
            *(str(tmp_path / "default_worker.py"), "--node-id=n", "--webui="),
            *(f"--language={language}", f"--serialized-runtime-env-context={json.dumps(context)}"),
        ]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    return start


def test_a_worker_has_the_environment_that_ray_wants_for_it(started):
    assert started(env_vars={"OURS": "a=b"}) == ["worker", "a=b", "--node-id=n", "--webui="]
    assert started() == ["worker", "None", "--node-id=n", "--webui="]


@pytest.mark.parametrize(
    "more",
    [
        {"command_prefix": ["nice"]},
        {"py_executable": "/elsewhere/python"},
        {"override_worker_entrypoint": "other.py"},
        {"env_vars": {"OURS": "${HOME}/x"}},
        {"language": "CPP"},
    ],
)
def test_a_worker_for_which_more_is_wanted_is_started_by_rays_own_program(started, more):
    told = started(**more)
    assert told[0] == "ray"
    assert told[2:4] == ["--node-id=n", "--webui="]
    assert any(word.startswith("--serialized-runtime-env-context=") for word in told)


def test_a_dashboards_agent_offers_nothing_and_ends_with_its_raylet(tmp_path):
    names = [f"{name}_n1" for name in ray_agent.NOT_OFFERED]
    raylet = (
        "import subprocess, sys, pathlib, time\n"
        f"words = [{ray_agent.__file__!r}, 'agent.py', '--node-id=n1', '--session-dir={tmp_path}']\n"
        "print(subprocess.Popen([sys.executable, *words], stdout=2).pid)\n"
        f"while not all((pathlib.Path({str(tmp_path)!r}) / name).exists() for name in {names}):\n"
        "    time.sleep(0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", raylet], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert {(tmp_path / name).read_text() for name in names} == {"-1"}
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended already
        psutil.Process(int(done.stdout)).wait(20)
