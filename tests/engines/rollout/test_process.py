"""Processes that end with their owner, and ports that two owners never share."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import ServerError, wait_until_up
from rollflow.engines.scratch import scratch_folder

OWNER = """
import sys, time
from pathlib import Path
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server_args import router_arguments
arguments = router_arguments(
    {}, port=PortLease().port, metrics_port=PortLease().port, timeout_s=60
)
process = OwnedProcess("router", arguments, Path(sys.argv[1]), "cpu")
print(process.pid, flush=True)
while True:
    time.sleep(60)
"""


def test_a_process_ends_when_its_owner_is_killed(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        guard = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([guard, *guard.children(recursive=True)], timeout=30)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


async def test_a_process_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path):
    process = OwnedProcess("router", {"no_such_argument": 1}, tmp_path / "log", "cpu")
    with pytest.raises(ServerError, match=r"(?s)router ended .*no_such_argument"):
        await wait_until_up("router", process, "http://127.0.0.1:9/health", 60)
    process.kill()
    assert process.exit_code != 0


async def test_a_process_that_does_not_answer_in_time_is_named(tmp_path: Path):
    lease, metrics = PortLease(), PortLease()
    arguments = {"port": lease.port, "host": "127.0.0.1", "prometheus_port": metrics.port}
    process = OwnedProcess("router", arguments, tmp_path / "log", "cpu")
    with pytest.raises(ServerError, match=r"router did not answer .* within 0 s"):
        await wait_until_up("router", process, "http://127.0.0.1:9/health", 0.01)
    process.kill()
    assert process.exit_code is not None


def test_a_scratch_folder_is_swept_up_once_its_owner_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from rollflow.engines.scratch import scratch_folder;"
        "print(scratch_folder(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    abandoned = Path(killed.stdout.strip())
    assert abandoned.is_dir()
    mine, other = scratch_folder(), scratch_folder()
    assert not abandoned.exists()
    assert mine.is_dir()
    assert other.is_dir()


def test_leases_held_at_once_differ_and_a_released_port_is_free_again():
    leases = [PortLease() for _ in range(50)]
    assert len({lease.port for lease in leases}) == 50
    for lease in leases:
        lease.release()
