"""Seconds from a kill until training goes on, split into what is waited for."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rollflow.flows.recipes import arithmetic
from rollflow.flows.status import Status, read_status

DEADLINE_S = 300.0
POLL_S = 0.01
STEPS, EVERY = 12, 4
VICTIMS = {"trainer rank": 6, "flow": 10}
"""What is killed, while it trains which step; the newest checkpoint is two or three steps older."""
PARTS = ("detection", "stop", "engine start", "load", "redo")


async def measure(console: Console) -> dict:
    """Kill a trainer rank and the flow of a training; print and give the seconds by part."""
    found: dict[str, dict[str, float]] = {}
    with _training(f"bench-recovery-{datetime.now(UTC):%Y%m%d-%H%M%S}") as training:
        for victim, step in VICTIMS.items():
            found[victim] = training.kill(victim, step)
    table = Table("killed", *PARTS, "total", title="Seconds from a kill to training again")
    for victim, split in found.items():
        table.add_row(victim, *(f"{split[part]:.1f}" for part in (*PARTS, "total")))
    console.print(table)
    return found


class _Training:
    """``rollflow train`` in a process of its own, watched through its status file."""

    def __init__(self, name: str) -> None:
        model = arithmetic.make(Path(".rollflow/arithmetic")).model
        self._name = name
        self._command = [
            *(sys.executable, "-m", "rollflow", "train", "arithmetic_cpu"),
            *("--name", name, "--steps", str(STEPS), "--checkpoint.every", str(EVERY)),
            *("--evals", "[]", "--trainer.lr_decay_style", "constant"),
            *("--trainer.lr_warmup_steps", "0"),
            *("--model.path", str(model), "--model.random_weights", "true"),
        ]
        self._log = Path(f".rollflow/logs/{name}.log").resolve()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._flow = self._start()

    def kill(self, victim: str, step: int) -> dict[str, float]:
        """Kill while ``step`` is trained; seconds by part until that step is trained again."""
        self._wait(lambda s: (s.step, s.phase) == (step, "train"), f"step {step} to be trained")
        moments = {"kill": time.monotonic()}
        if victim == "flow":
            self._flow.kill()
            self._flow.wait()
            self._flow = self._start()
        else:
            self._rank().kill()
        flow = self._flow.pid
        lost = self._wait(
            lambda s: s.pid == flow and (s.phase == "start engines" or s.phase.endswith(" failed")),
            "the loss to be seen",
        )
        moments["detection"] = lost
        for part, phase in (("stop", "start engines"), ("engine start", "load checkpoint")):
            moments[part] = self._wait(lambda s, p=phase: s.pid == flow and s.phase == p, phase)
        moments["load"] = self._wait(lambda s: s.pid == flow and s.phase == "find", "redo")
        moments["redo"] = self._wait(
            lambda s: s.pid == flow and (s.step > step or (s.step, s.phase) == (step, "train")),
            f"step {step} to be trained again",
        )
        times = list(moments.values())
        split = {
            part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)
        }
        return {**split, "total": times[-1] - times[0]}

    def stop(self) -> None:
        """Wait for the end of the run, or end it."""
        try:
            self._flow.wait(DEADLINE_S)
        finally:
            self._flow.kill()

    def _start(self) -> subprocess.Popen:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _rank(self) -> psutil.Process:
        family = psutil.Process(self._flow.pid).children(recursive=True)
        return next(p for p in family if " ".join(p.cmdline()).startswith("ray::TrainerRank"))

    def _wait(self, reached: Callable[[Status], bool], what: str) -> float:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            status: Status | None = read_status(self._name)
            if status and reached(status):
                return time.monotonic()
            if self._flow.poll() is not None:
                raise RuntimeError(f"the training ended while {what} was awaited; see {self._log}")
            time.sleep(POLL_S)
        raise RuntimeError(f"waited {DEADLINE_S:.0f} s for {what}; see {self._log}")


@contextmanager
def _training(name: str) -> Iterator[_Training]:
    training = _Training(name)
    try:
        yield training
    finally:
        training.stop()
