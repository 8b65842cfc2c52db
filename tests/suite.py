"""``python -m tests.suite [PYTEST'S ARGUMENTS]``: pytest with three workers, forks of a process that imports once.

What the tests import takes 20 seconds of a core, three times as much where nothing is compiled yet, and each of
pytest-xdist's workers would do it anew. A worker that takes a dead one's place does.
"""

import ast
import atexit
import gc
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

WORKERS = 3
"""Tests of what dies wait for it: two leave cores idle."""
IMPORTED = (
    "rollflow.engines.megatron.rank",
    "rollflow.engines.rollout.manager",
    "rollflow.flows.cli",
    "rollflow.flows.deployments",
    "rollflow.flows.prefect_server",
    "transformers.models.glm4.modeling_glm4",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "math_verify",
    "pandas",
    "s3fs",
)
"""Modules that most of the imports hang on."""
EARLY = "Module already imported so cannot be rewritten; anyio:pytest.PytestAssertRewriteWarning"
"""Prefect loads it, and it has a plugin for pytest, of which no assertion is to be explained."""


def main(arguments: Sequence[str]) -> int:
    """Import, fork the workers, and be pytest; its exit status."""
    import_all()
    workers: list[Worker] = []
    for _ in range(WORKERS):
        workers.append(Worker(workers))
    import pytest
    from execnet import gateway_io
    from execnet.gateway_base import Popen2IO

    class Popen2IOMaster(gateway_io.Popen2IOMaster):
        """A worker as execnet has it: the next of ours, or a process of its own once there is none."""

        def __init__(self, args, execmodel) -> None:
            if not workers:
                super().__init__(args, execmodel)
                return
            self.popen = worker = workers.pop(0)
            Popen2IO.__init__(self, worker.stdin, worker.stdout, execmodel)

    gateway_io.Popen2IOMaster = Popen2IOMaster
    return pytest.main(["-n", str(WORKERS), "-W", f"ignore:{EARLY}", *arguments])


def import_all() -> None:
    """Import what workers share, and take it out of what the collector looks through."""
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of each package that is not there
        from rollflow.engines.platform import detect

        detect("cpu").import_megatron()
        for name in IMPORTED:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


class Worker:
    """A fork that serves execnet, with the verbs of a ``subprocess.Popen``."""

    def __init__(self, before: Sequence["Worker"]) -> None:
        """Of the pipes of those ``before`` it keeps no end: each ends once this process is gone."""
        (requests, stdin), (stdout, answers) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0)
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for worker in (*before, self):
                    worker.stdin.close()
                    worker.stdout.close()
                os.dup2(requests, 0)
                os.dup2(answers, 1)
                os.close(requests)
                os.close(answers)
                serve()
                atexit._run_exitfuncs()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a fork has no other place to tell it
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(requests)
        os.close(answers)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)


def serve() -> None:
    """Do what a process would that execnet starts: read on standard input what to be, and be it."""
    sys.argv = ["-c"]
    sys.modules["__main__"] = program = ModuleType("__main__")
    line = b""
    while not line.endswith(b"\n"):  # not a byte more than execnet's first line
        line += os.read(0, 1) or b"None\n"
    exec(ast.literal_eval(line.decode()) or "", vars(program))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
