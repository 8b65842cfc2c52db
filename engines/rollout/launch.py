"""``python -m rollflow.engines.rollout.launch server|router``: one process that its owner keeps.

The owner writes one line of JSON, the arguments, to standard input and leaves the pipe open. A
guard waits for the end of the pipe, which comes whatever ended the owner, and then kills the
process and all that it started: no orphan. The guard is a process of its own because the router
never lets another Python thread run. ``fork-server`` is what servers are forks of on a CPU, each
with such a guard.
"""

import ctypes
import gc
import json
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from rollflow.engines.rollout import fork_server
from rollflow.engines.scratch import scratch_folder

ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
"""SGLang's own switch, set by the owner. Processes that SGLang spawns inherit it, and import this
module before any of SGLang's."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

if ON_CPU and __name__ == "__mp_main__":
    from rollflow.engines.cpu import routed_experts as _routed_experts
    from rollflow.engines.cpu import seeded_sampling as _seeded_sampling
    from rollflow.engines.cpu import sglang as _cpu_support
    from rollflow.engines.rollout import server_channel as _server_channel

    _cpu_support.install()
    _seeded_sampling.install()
    _routed_experts.install()
    _server_channel.install()
elif __name__ == "__mp_main__":
    from rollflow.engines.gpu import sampler as _sampler
    from rollflow.engines.gpu import server_answers as _server_answers
    from rollflow.engines.gpu import server_heads as _server_heads
    from rollflow.engines.gpu import server_logits as _server_logits
    from rollflow.engines.gpu import server_norms as _server_norms
    from rollflow.engines.gpu import server_weights as _server_weights
    from rollflow.engines.rollout import server_channel as _server_channel

    _sampler.install()
    _server_weights.install()
    _server_channel.install()
    _server_answers.install()
    _server_heads.install()
    _server_norms.install()
    _server_logits.install()


def main() -> int:
    """Run what ``sys.argv[1]`` names until it ends or its owner does; gives its exit status."""
    kind = sys.argv[1]
    if kind == "fork-server":
        fork_server.serve(_load_for_forks, _keep_fork)
    return keep({"server": run_server, "router": run_router}[kind], json.loads(_read_line()))


def keep(run: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> int:
    """``run`` in a process of its own, guarded by this one until either it or standard input ends.

    Returns in the guard, with the exit status of the other, which ends by SystemExit.
    """
    temporary = str(scratch_folder())
    guard = os.getpid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        os.setpgid(0, 0)
        _die_with_guard(guard)
        run(arguments)
        sys.exit(0)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: os.killpg(child, signal.SIGKILL))
    try:
        return _guard(child)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_server() -> None:
    """Import SGLang and put in what we change of it; of all this nothing depends on arguments."""
    if ON_CPU:
        from rollflow.engines.cpu import routed_experts, seeded_sampling
        from rollflow.engines.cpu import sglang as cpu_support
        from rollflow.engines.rollout import server_channel

        cpu_support.install()
        cpu_support.fork_subprocesses()
        seeded_sampling.install()
        routed_experts.install()
        server_channel.install()
    else:
        from rollflow.engines.gpu import sampler, server_answers, server_weights

        sampler.install()
        server_weights.install()
        server_answers.install_telling()
    _leave_out("megatron")  # SGLang's debugger looks whether it is there
    import sglang.srt.entrypoints.http_server  # noqa: F401 - what takes long

    from rollflow.engines.rollout import group_seeds

    group_seeds.install()
    if ON_CPU:
        from rollflow.engines.cpu import attention

        attention.install()


def run_server(arguments: dict[str, Any]) -> None:
    """Run one SGLang HTTP server. ``arguments``: fields of its ServerArgs."""
    load_server()
    run_loaded(arguments)


def run_loaded(arguments: dict[str, Any]) -> None:
    """:func:`run_server` where the imports are done."""
    if not arguments.get("dist_init_addr"):
        # A rendezvous over TCP would listen on every interface; a file does not.
        rendezvous = f"file://{tempfile.gettempdir()}/rendezvous"
        os.environ.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", rendezvous)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    from rollflow.engines.rollout import experts

    if arguments.get(experts.SWITCH):
        experts.ask_by_id()
    launch_server(ServerArgs(**arguments))


def _load_for_forks() -> None:
    """Before the first fork: what a server imports, and its scheduler once it has started."""
    load_server()
    import setproctitle
    import sglang.srt.managers.tp_worker

    if not os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"):  # only a fork may find it
        import sglang.srt.models.registry  # noqa: F401
    gc.collect()
    gc.freeze()  # collections of the forks neither look at it nor, by that, copy it
    setproctitle.getproctitle()  # it finds the title's place only as long as the environment is untouched


def _keep_fork(arguments: dict[str, Any]) -> int:
    """A server in a fork of the fork server: under its own name, with random numbers of its own."""
    import numpy as np
    import setproctitle

    setproctitle.setproctitle(f"{sys.executable} -m rollflow.engines.rollout.launch server")
    np.random.seed()
    return keep(run_loaded, arguments)


def run_router(arguments: dict[str, Any]) -> None:
    """Run one sglang-router. ``arguments``: fields of its RouterArgs."""
    _leave_out("sglang")  # a balancer that is not used here would import it, and PyTorch with it
    from sglang_router.launch_router import launch_router
    from sglang_router.router_args import RouterArgs

    launch_router(RouterArgs(**arguments))  # pyright: ignore[reportArgumentType]


def _leave_out(package: str) -> None:
    """Make imports of an optional package fail: what nobody uses costs seconds and memory at each start."""
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]


def _read_line() -> bytes:
    """Read one line from standard input and not a byte more, so that nothing is left buffered."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit("the owner closed the pipe before it sent arguments")
        line += byte
    return line


def _guard(child: int) -> int:
    """Wait for the child or for the end of standard input, then end and reap all that it started."""
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.poll()
    os.killpg(child, signal.SIGKILL)
    status = 0
    try:
        while True:  # orphans of the child are handed to this process
            pid, ended = os.wait()
            status = ended if pid == child else status
    except ChildProcessError:
        return os.waitstatus_to_exitcode(status)


def _die_with_guard(guard: int) -> None:
    """Have the kernel kill this process when the guard ends, even by SIGKILL."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(main())
