"""Ray: a private cluster on loopback or one that runs already, and calls to actors with a deadline.

Engines are named actors in the run's namespace, so a task finds them by name alone.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services, utils
from ray._private.node import Node
from ray.exceptions import RayActorError, RayTaskError

from . import ray_agent, worker_start
from .config import ClusterConfig
from .platform import detect, one_thread_env
from .scratch import scratch_folder

ORDER = "order"
"""Name of the actor that hands out calls to several actors at once."""
OBJECT_STORE_BYTES = 128 << 20
"""Batches travel through the run's store, so Ray's own object store can be small."""
REACH_S = 10.0
"""How long the head of a Ray that runs already may take to accept a connection."""
CULPRIT_S = 3.0
"""After one actor failed: how long others may take to fail too, so that the first cause is named."""


FOLDER = "ROLLFLOW_FOLDER"
NULL = "null"
"""Address of no cluster: actors are plain objects in this process."""
_here: dict[str, Any] = {}
"""Those objects by name; empty while Ray is connected."""


class DeadlineError(RuntimeError):
    """A wait ended without an answer; the message names what was waited for and for how long."""


class EngineDiedError(RuntimeError):
    """An engine's process ended while it was called; the message names it."""


@dataclass(frozen=True, slots=True)
class ClusterRef:
    """A connection to Ray, e.g. ``ClusterRef("local", "arithmetic", "/tmp/rf-0/x1y2z3w4")``."""

    address: str
    namespace: str
    temp_dir: str
    """Ray's private folder, removed by :func:`disconnect`; empty for a cluster of someone else."""


def connect(config: ClusterConfig, namespace: str) -> ClusterRef:
    """Start a private Ray on loopback, or join ``config.address``.

    A private Ray ends with this process, and with it every engine. Its folder is short because
    Unix sockets inside it may not exceed 107 bytes. Ray asks for its token (``~/.ray/auth_token``).

    Raises:
        DeadlineError: a private one did not come up.
        RuntimeError: nobody listens at ``config.address``.
    """
    if ray.is_initialized():
        ray.shutdown()
    _here.clear()
    if config.address == NULL:
        return ClusterRef(NULL, namespace, "")
    with _sigterm_kept():
        join = _join if config.address != "local" else _start
        return ClusterRef(config.address, namespace, join(config, namespace))


def _join(config: ClusterConfig, namespace: str) -> str:
    if config.address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        _stay_on_loopback()  # else Ray takes such an address for that of another interface
    _reach(config.address)
    ray.init(
        address=config.address,
        namespace=namespace,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={**_environment(), "worker_process_setup_hook": f"{__name__}.enter_folder"},
    )
    return ""


def _start(config: ClusterConfig, namespace: str) -> str:
    temp_dir = str(scratch_folder())
    try:
        _start_private(namespace, temp_dir, detect(config.device).gpus)
    except BaseException as error:  # a signal too: what was started must not outlive us
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
        if type(error) is Exception:  # as Ray's are that found no answer in its time
            raise DeadlineError(f"a private Ray did not start: {error}") from error
        raise
    return temp_dir


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Leave SIGTERM to whoever has it: Ray's own handler aborts the process 3 s after it, whatever is
    still being put away."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _start_private(namespace: str, temp_dir: str, gpus: int) -> None:
    _stay_on_loopback()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with _nothing_but_ray():
        ray.init(
            address="local",
            namespace=namespace,
            num_cpus=1,
            num_gpus=gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
            _system_config={
                "worker_niceness": 0,  # by default anything else starves the engines
                "prestart_worker_first_driver": False,  # nobody uses a worker without our environment
            },
            runtime_env=_environment(),
        )


@contextlib.contextmanager
def _nothing_but_ray() -> Iterator[None]:
    """Leave out what watches a Ray that people share: its autoscaler, the dashboard's server and agent, and
    the reader of logs. They and what imports Ray twice for each worker are most of what engines wait for."""
    replaced: list[tuple[Any, str, Any]] = [
        (Node, name, lambda self, **_: None)
        for name in ("start_monitor", "start_api_server", "start_log_monitor")
    ]
    replaced += [
        (Node, "start_raylet", _start_raylet),
        (services, "_build_python_executable_command_memory_profileable", _command_of),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not asked for")),
    ]
    with contextlib.ExitStack() as after:
        for owner, name, ours in replaced:
            after.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield


_rays_start_raylet = Node.start_raylet
_rays_command_of = services._build_python_executable_command_memory_profileable


def _start_raylet(node: Node, *args: Any, **kwargs: Any) -> None:
    node._ray_params.setup_worker_path = worker_start.__file__
    _rays_start_raylet(node, *args, **kwargs)


def _command_of(component: str, *args: Any, **kwargs: Any) -> list[str]:
    if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT:
        return [sys.executable, ray_agent.__file__]
    return _rays_command_of(component, *args, **kwargs)


def _reach(address: str) -> None:
    """Find out at once what Ray would say after minutes.

    Raises:
        RuntimeError: nobody listens at ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():  # "auto", and addresses with a scheme: Ray knows them
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise RuntimeError(
            f"cluster.address = {address!r}: no Ray listens there ({error}); start one by `ray start "
            '--head`, or leave the setting at "local" for a private Ray'
        ) from error


def _stay_on_loopback() -> None:
    """Without this Ray answers on every interface, whatever node address it is given."""
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _environment() -> dict[str, dict[str, str]]:
    """What engines find in their environment: hooks are looked for in this folder."""
    folder = str(Path.cwd())
    paths = [folder, *(p for p in (os.environ.get("PYTHONPATH"),) if p)]
    return {"env_vars": {**one_thread_env(), "PYTHONPATH": os.pathsep.join(paths), FOLDER: folder}}


def enter_folder() -> None:
    """In a process of a Ray that runs already: go to the folder in which relative paths are meant."""
    os.chdir(os.environ[FOLDER])


def disconnect(ref: ClusterRef) -> None:
    """Leave Ray; a private one is stopped and its folder removed."""
    _here.clear()
    if ref.address == NULL:
        return
    ray.shutdown()
    if ref.temp_dir:
        shutil.rmtree(ref.temp_dir, ignore_errors=True)


def start_here(cls: type, name: str, *args: object) -> None:
    """Make the named actor a plain object of this process, for engines that compute nothing."""
    _here[name] = cls(*args)


def start_actor(cls: type, name: str, *args: object, gpus: float = 0, **options: Any) -> None:
    """Create the named actor ``cls(*args)``; detached, it outlives the handle.

    CPU slots are not reserved: engines share the cores."""
    remote = ray.remote(num_cpus=0, num_gpus=gpus, **options)(cls)
    remote.options(name=name, lifetime="detached").remote(*args)


def find_actor(name: str) -> Any:
    """The Ray handle of the live actor of that name in the run's namespace.

    Raises:
        EngineDiedError: there is none.
    """
    try:
        return ray.get_actor(name)
    except ValueError as error:
        raise EngineDiedError(f"engine {name!r} is not running") from error


class Order:
    """Hands each call to all of several actors before the next: the same order on every one.

    Calls of one process reach each actor in the order in which it made them. Where several
    processes call the ranks of one model directly, two ranks may see two calls in different
    orders, and each then waits in its collectives for the other. Through one such actor none can.
    """

    async def hand_out(self, actors: Sequence[Any], method: str, args: Sequence[Any]) -> list[Any]:
        """Call ``method`` on each; references to the answers, in the order of ``actors``."""
        return [getattr(actor, method).remote(*args) for actor in actors]


def start_order() -> None:
    """Start the actor through which :func:`call` reaches several actors of this namespace."""
    start_actor(Order, ORDER)


async def hand_out(order: Any, actors: Sequence[Any], method: str, *args: object) -> list[Any]:
    """References to the answers of ``method`` on each actor, called through ``order``.

    Without one they are called directly; a single actor needs none.
    """
    if order is None:
        return [getattr(actor, method).remote(*args) for actor in actors]
    return await order.hand_out.remote(list(actors), method, args)


async def call(
    names: str | Sequence[str], method: str, *args: object, timeout_s: float
) -> list[Any]:
    """Call ``method`` on each named actor at once and wait for all answers, in the order of names.

    Several actors are called through the :class:`Order` of this namespace.

    Raises:
        DeadlineError: names the actors that had not answered after ``timeout_s`` seconds.
        EngineDiedError: names an actor whose process is gone.
    """
    names = [names] if isinstance(names, str) else list(names)
    if all(name in _here for name in names):
        answers = [asyncio.to_thread(getattr(_here[name], method), *args) for name in names]
    else:
        references = await _called(names, method, args, timeout_s)
        answers = [_answer(reference) for reference in references]
    pending = {asyncio.ensure_future(a): n for a, n in zip(answers, names, strict=True)}
    try:
        done, late = await asyncio.wait(
            pending, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        if any(future.exception() for future in done) and late:
            # Ranks fail one another: wait a moment for the one whose process is gone.
            more, late = await asyncio.wait(late, timeout=CULPRIT_S)
            done |= more
        errors = [(e, pending[f]) for f in done if (e := f.exception())]
        for error, name in sorted(errors, key=lambda e: not isinstance(e[0], RayActorError)):
            raise _named(error, name, method) from error
        if late:
            culprits = ", ".join(sorted(pending[f] for f in late))
            raise DeadlineError(f"waited {timeout_s:.0f} s for {method} of {culprits}: no answer")
    finally:
        for future in pending:
            future.cancel()
    return [future.result() for future in pending]


async def _called(
    names: Sequence[str], method: str, args: Sequence[object], timeout_s: float
) -> list[Any]:
    actors = [find_actor(name) for name in names]
    order = find_actor(ORDER) if len(names) > 1 else None
    try:
        async with asyncio.timeout(timeout_s):
            return await hand_out(order, actors, method, *args)
    except TimeoutError:
        raise DeadlineError(f"waited {timeout_s:.0f} s for {ORDER}: no answer") from None
    except RayActorError as error:
        raise _named(error, ORDER, method) from error


async def _answer(reference: Any) -> Any:
    return await reference


def _named(error: BaseException, name: str, method: str) -> BaseException:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    if isinstance(error, RayActorError):
        return EngineDiedError(
            f"engine {name!r} died during {method}: {str(error).splitlines()[0]}"
        )
    return error


def kill_actors(names: Sequence[str]) -> None:
    """End the named actors that still live; those that are gone already are fine."""
    for name in names:
        if _here.pop(name, None) is not None or not ray.is_initialized():
            continue
        try:
            ray.kill(ray.get_actor(name), no_restart=True)
        except ValueError:
            print(f"engine {name} had ended already", file=sys.stderr)
