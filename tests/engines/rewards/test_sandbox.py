"""Hostile programs in the sandbox: each ends within its limits and reaches nothing."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollflow.engines.rewards.code import code, extract_program
from rollflow.engines.rewards.sandbox import Limits, run_python
from rollflow.storage.samples import Sample, Status

LIMITS = Limits(seconds=3.0, memory_bytes=256 << 20, file_bytes=4 << 20, output_bytes=1 << 16)
SLACK_S = 10.0
"""Starting and ending a process on a busy machine."""

HOSTILE = {
    # network
    "connects to loopback": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "sends a datagram": "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('192.0.2.1', 53))",
    "looks a name up": "import socket; socket.getaddrinfo('example.org', 80)",
    "opens a raw socket": "import socket; socket.socket(2, 3, 1)",
    "connects to an abstract socket": (
        "import socket; s = socket.socket(1); s.connect('\\0rollflow-hostile')"
    ),
    "fetches a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
    # processes
    "fork bomb": "import os\nwhile True: os.fork()",
    "starts a shell": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "double fork and leave": "import os\nif os.fork() == 0:\n os.setsid(); os.fork()",
    "spawns by posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {{}})",
    "multiprocessing": "import multiprocessing as m; m.Process(target=print).start()",
    "clone by system call": (
        "import ctypes, os\nif ctypes.CDLL(None, use_errno=True).syscall(56, 17, 0, 0, 0, 0) < 0: "
        "os._exit(1)"
    ),
    "vfork by system call": (
        "import ctypes, os\nif ctypes.CDLL(None, use_errno=True).syscall(58) < 0: os._exit(1)"
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()"
    ),
    # signals and other processes
    "kills its parent": "import os; os.kill(os.getppid(), 9); os.kill({pid}, 9)",
    "kills the owner": "import os; os.kill({pid}, 15)",
    "kills everybody": "import os; os.kill(-1, 9); os.kill({pid}, 9)",
    "traces a process": (
        "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) < 0: os._exit(1)"
    ),
    "reads another's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "ignores signals for ever": (
        "import signal\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    # files
    "reads passwords": "open('/etc/shadow').read()",
    "reads a secret outside": "open({secret!r}).read()",
    "writes outside": "open({secret!r}, 'w').write('x')",
    "writes into the interpreter": "import os; open(os.__file__, 'a').write('x')",
    "writes to /usr": "open('/usr/hostile', 'w')",
    "climbs out of its folder": "open('../../../../' + {secret!r}).read()",
    "links to a secret": "import os; os.symlink({secret!r}, 'l'); open('l').read()",
    "fills the disk": "f = open('big', 'wb')\nwhile True: f.write(b'x' * 65536); f.flush()",
    "makes many files": "i = 0\nwhile True: open(str(i), 'w').write('x' * 5000); i += 1",
    "opens many files": "f = [open('/dev/null') for _ in range(100000)]",
    "mounts": (
        "import ctypes, os\nif ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None) < 0: "
        "os._exit(1)"
    ),
    "makes a device": "import os, stat; os.mknod('sda', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "leaves its root": "import os; os.chroot('/proc/1/root')",
    # memory, time, output
    "ten gigabytes at once": "x = bytearray(10 << 30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory by a map": "import mmap; m = mmap.mmap(-1, 8 << 30)",
    "huge number": "x = 9 ** 9 ** 9",
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(10**6)",
    "endless output": "while True: print('x' * 4096)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "endless recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "dumps core": "import os; os.abort()",
    "waits for input": "while True: input()",
}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A secret file, a listening port and this process: what the programs are after."""
    secret = tmp_path_factory.mktemp("secret") / "key"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0rollflow-hostile")
        local.listen()
        server.settimeout(0.0)
        yield {"secret": str(secret), "port": server.getsockname()[1], "pid": os.getpid()}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped_and_reaches_nothing(
    surroundings: dict[str, object], name: str
):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    started = time.monotonic()
    done = run_python(HOSTILE[name].format(**surroundings), limits=LIMITS)
    assert time.monotonic() - started < LIMITS.seconds + SLACK_S
    assert done.exit_code != 0
    assert "secret" not in done.output
    assert len(done.output) <= LIMITS.output_bytes
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    assert not Path("/usr/hostile").exists()


def test_a_program_reads_its_input_and_uses_threads_and_its_folder():
    program = """
import threading
t = threading.Thread(target=lambda: open("f", "w").write(input()[::-1])); t.start(); t.join()
print(open("f").read())
"""
    assert run_python(program, "abc\n").output == "cba\n"


def sample(answer: str, tests: list[Any]) -> Sample:
    return Sample(
        run="r", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="g#0",
        prompt_text="", response_text=answer, prompt_ids=[], response_ids=[], loss_mask=[],
        rollout_logprobs=[], policy_versions=[], status=Status.COMPLETED, finish_reason="stop",
        metadata={"tests": tests},
    )  # fmt: skip


def test_code_is_judged_by_what_it_prints_and_by_assertions():
    right = "So:\n```python\ndef f(n):\n    return 2 * n\nif __name__ == '__main__':\n    print(f(int(input())))\n```\n"
    tests = [{"input": "4\n", "output": "8"}]
    assert code(sample(right, tests)) == {"reward": 1.0, "passed": 1.0}
    mixed = [*tests, {"input": "1\n", "output": "3"}]
    assert code(sample(right, mixed)) == {"reward": 0.0, "passed": 0.5}
    assert extract_program(right).startswith("def f(n)")
    assertion = "```python\ndef f(n):\n    return 2 * n\n```"
    assert code(sample(assertion, ["assert f(3) == 6"]))["reward"] == 1.0
    assert code(sample(assertion, ["assert f(3) == 7"]))["reward"] == 0.0


def test_a_program_that_leaves_before_its_tests_does_not_pass_them():
    quitter = "```python\nimport os\ndef f(n):\n    return 0\nos._exit(0)\n```"
    assert code(sample(quitter, ["assert f(3) == 6"]))["reward"] == 0.0
