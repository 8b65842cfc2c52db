"""``python -m rollflow.engines.rollout.reward_worker``: a process that scores for its owner.

It reads messages from standard input, each a pickled list of what calls are given, pickled one by
one, and writes a line of JSON for each call to standard output; the owner believes nothing else of
what comes from here. What the reward function prints goes nowhere, and what it forks cannot answer in
its stead.
"""

import ctypes
import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from rollflow.engines.hooks import load_hook, parse_reward

ERROR_CHARACTERS = 2000
PR_SET_PDEATHSIG = 1


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Load the function that the first request names, then score until the owner is gone."""
    own_pid = os.getpid()
    setup = pickle.loads(_read(requests))
    sys.path[:] = setup["sys_path"]
    _limit_memory(setup["memory_bytes"])
    function = load_hook(setup["path"], "reward")
    _write(answers, {"ready": True})
    while data := _read(requests):
        for pickled in pickle.loads(data):
            answer = _call(function, pickled)
            if os.getpid() != own_pid:
                os._exit(0)  # a fork that the function left behind
            _write(answers, answer)


def _call(function: Any, pickled: bytes) -> dict[str, Any]:
    try:
        argument = pickle.loads(pickled)
        result = function(argument)
        if isinstance(argument, Sequence):
            return {"rewards": [parse_reward(r) for r in _of_group(result, len(argument))]}
        return {"rewards": [parse_reward(result)]}
    except BaseException as error:  # noqa: BLE001 - the function is the user's: it may raise anything
        return {"error": repr(error)[:ERROR_CHARACTERS]}


def _of_group(result: Any, n: int) -> list[Any]:
    rewards = list(result)
    if len(rewards) != n:
        raise ValueError(f"reward function returned {len(rewards)} rewards for {n} samples")
    return rewards


def _limit_memory(limit: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(stream: BinaryIO) -> bytes:
    head = stream.read(8)
    if len(head) < 8:
        return b""
    return stream.read(struct.unpack("<Q", head)[0])


def _write(stream: BinaryIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even while a function hangs
    _in, _out = os.dup(0), os.dup(1)  # the function gets neither
    for descriptor in (_in, _out):
        os.set_inheritable(descriptor, False)
    _null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(_null, descriptor)
    with os.fdopen(_in, "rb") as _requests, os.fdopen(_out, "wb") as _answers:
        main(_requests, _answers)
