"""Real S3 servers on loopback: rclone's, and moto's, which also honours conditional puts.

They live in an environment of their own, ``.venv-s3``, which ``make s3-servers`` makes.

``python -m tests.object_stores COMMAND ...`` runs a command beside an rclone: with credentials,
``AWS_ENDPOINT_URL`` and ``ROLLFLOW_BENCH_STORE`` in its environment, ``s3://rollflow-tests`` there.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import psutil
import s3fs

KEY, SECRET = "rollflow-test-key", "rollflow-test-secret"
BUCKET = "rollflow-tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What a client needs to have in its environment."""
ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv-s3/bin"
START_TIMEOUT_S = 60.0

Kind = Literal["rclone", "moto"]


def install() -> None:
    """Make the servers' environment unless it is there."""
    subprocess.run(["make", "--silent", "s3-servers"], cwd=ROOT, check=True, timeout=600)


class ObjectStoreServer:
    """A server with one bucket; rclone's keeps its objects in ``folder``, moto's in memory."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._port}"
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start it, again where it was killed, and wait until it answers."""
        log = self._folder.parent / f"{self._kind}.log"
        environment = {**os.environ, "HOME": str(self._folder.parent)}
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command(),
                stdout=stream,
                stderr=stream,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._kind} did not start; see {log}")
            time.sleep(0.05)
        if self._kind == "moto":
            client = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=self.endpoint)
            client.mkdir(BUCKET)

    def kill(self) -> None:
        """End it by SIGKILL: what it had half done stays half done."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def halt(self) -> None:
        """Let it do nothing more: who writes now is stuck in the middle, until ``kill``."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def wait_for_client(self) -> None:
        """Wait until this process has a connection to it."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._port not in {c.raddr.port for c in psutil.net_connections() if c.raddr}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody connects to {self.endpoint}")
            time.sleep(0.01)

    def _command(self) -> list[str]:
        address = f"127.0.0.1:{self._port}"
        if self._kind == "moto":
            return [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(self._port)]
        flags = ("--addr", address, "--auth-key", f"{KEY},{SECRET}", "--config", "")
        return [str(BIN / "rclone"), "serve", "s3", *flags, str(self._folder)]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(command: list[str]) -> int:
    """Run ``command`` beside a server; its exit status."""
    install()
    with tempfile.TemporaryDirectory(prefix="rollflow-s3-") as folder:
        server = ObjectStoreServer("rclone", Path(folder) / "objects")
        server.start()
        own = {"AWS_ENDPOINT_URL": server.endpoint, "ROLLFLOW_BENCH_STORE": f"s3://{BUCKET}/bench"}
        try:
            environment = {**os.environ, **ENVIRONMENT, **own}
            with subprocess.Popen(command, env=environment) as process:
                signal.signal(signal.SIGTERM, lambda *_: process.terminate())
                return process.wait()
        finally:
            server.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
