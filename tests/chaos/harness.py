"""Kill a process of a running training at a chosen moment, and judge what comes of it.

One *session* is one training run that is killed several times, each time at another step. The flow
is started again when it was the victim; from the loss of anything else it must recover by itself.
"""

import json
import random
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import psutil

from rollflow.flows.recipes import arithmetic
from rollflow.flows.status import Status
from rollflow.storage.config import StoreConfig
from rollflow.storage.lease import LeaseLostError, check_fence, newest_epoch
from rollflow.storage.ledger import durable_groups
from rollflow.storage.manifests import batch_folder, find_batch, read_table
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import open_run, run_ref
from rollflow.storage.schema import to_table
from rollflow.storage.steps import read_steps, step_numbers

ROLLFLOW = (sys.executable, "-m", "rollflow")
DEADLINE_S = 480.0
POLL_S = 0.004
"""Between two looks for a moment that is to be hit."""
SLOW_POLL_S = 0.05
"""Between two looks for anything else: looking takes a good part of a core from what it looks at."""
GRACE_S = 20.0
"""What belongs to a killed process notices that within seconds and ends itself."""

VICTIMS = {
    "flow": ("rollflow", " train "),
    "trainer": ("ray::TrainerRank",),
    "rollout manager": ("ray::RolloutManager",),
    "sglang server": ("rollflow.engines.rollout.launch server",),
    "sglang scheduler": ("sglang::scheduler",),
    "router": ("sglang::router",),
    "raylet": ("raylet/raylet",),
    "prefect server": ("prefect_server server start",),
}
"""Process -> words that all stand in its command line."""

PHASES = (
    "generate",
    "between shards",
    "before A",
    "after A",
    "train",
    "sync",
    "before B",
    "after B",
    "mid-checkpoint",
)

CONFIG = """
steps = {steps}
[store]
url = "{store}"
[cluster]
device = "cpu"
lease_s = {lease_s}
[model]
path = "arithmetic/model"
random_weights = true
[data]
path = "arithmetic/train.jsonl"
[rollout]
batch_size = 8
n_samples_per_prompt = 2
servers = {engines}
shard_groups = 1
deterministic = {deterministic}
mode = "{mode}"
reward = "rollflow.engines.rewards.exact_match:exact_match"
sampling = {{ max_new_tokens = 4 }}
[algorithm]
entropy_coef = 0.01
[trainer]
ranks = {engines}
max_tokens_per_micro_batch = 64
[checkpoint]
every = 2
hf = false
[megatron]
lr = 1e-3
"""
"""The entropy term moves the weights at every step, whatever the rewards are."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Which process dies, when: at ``phase`` of ``step``, ``delay_s`` after it was seen."""

    seed: int
    process: str
    phase: str
    step: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: what came of a kill."""

    seed: int
    process: str
    phase: str
    step: int
    recovered: bool
    digest_equal: bool
    """All weights from here to the next kill are those of the run that nobody killed."""
    lost: int
    """Durable samples that came out different or not at all, and samples not consumed once."""
    seconds_to_training: float | None
    """From the kill until a step is committed that was not before."""
    note: str = ""


def plan(seed: int, kills: int) -> list[Kill]:
    """A seeded schedule in rounds: each kills every process once, and nine rounds make every pair.

    A raylet may stay dead until engines are started anew: two kills of it need a round between.
    """
    rng = random.Random(seed)
    phases = {process: rng.sample(PHASES, len(PHASES)) for process in VICTIMS}
    rounds = range(-(-kills // len(VICTIMS)))
    pairs = [
        (process, phases[process][number % len(PHASES)])
        for number in rounds
        for process in rng.sample(list(VICTIMS), len(VICTIMS))
    ]
    return [
        Kill(seed, process, phase, 1 + 2 * i, rng.uniform(0.0, 0.05))
        for i, (process, phase) in enumerate(pairs[:kills])
    ]


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained while things are killed."""

    steps: int
    store: str = ""
    """URL under which the runs are kept; in the folder of each session where it is empty."""
    engines: int = 2
    """Number of servers, and of trainer ranks."""
    mode: str = "sync"
    """``rollout.mode``. Only the synchronous one makes the same samples again when it is killed."""
    lease_s: float = 60.0
    """``cluster.lease_s``: how long a flow that sleeps keeps its run."""

    @property
    def repeats(self) -> bool:
        """Whether a run that nobody killed has the same weights."""
        return self.mode == "sync"


def prepare(folder: Path, training: Training) -> None:
    """Data, model and settings of the sessions in ``folder``."""
    arithmetic.make(folder / "arithmetic")
    store = f"{training.store}/{folder.name}" if training.store else folder / ".rollflow/store"
    (folder / "run.toml").write_text(
        CONFIG.format(
            steps=training.steps,
            store=store,
            engines=training.engines,
            mode=training.mode,
            lease_s=training.lease_s,
            deterministic=str(training.repeats).lower(),
        )
    )


def start(folder: Path, name: str) -> subprocess.Popen:
    """Start or continue the training of a session."""
    command = [*ROLLFLOW, "train", "run.toml", "--name", name]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


class Session:
    """One run that is killed several times."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        settings = tomllib.loads((folder / "run.toml").read_text())
        self.store = Store(StoreConfig(**settings["store"]))
        self.flow = start(folder, name)
        self._durable: dict[str, str] = {}

    @property
    def run(self) -> RunRef:
        """The session's run, without a lease: for reading."""
        return open_run(self.store, self.name)

    def status(self) -> Status | None:
        """Step and phase now; None before the first."""
        try:
            file = self.folder / f".rollflow/status/{self.name}.json"
            return Status(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None

    def strike(self, kill: Kill) -> float | str:
        """Wait for the moment, kill, wait for the next committed step: seconds, or what went wrong."""
        what = f"{kill.phase} of step {kill.step}"
        wrong = self._wait(lambda: self._is_near(kill.step), what)
        wrong = wrong or self._wait(lambda: self._reached(kill), what, POLL_S)
        if wrong:
            return wrong
        time.sleep(kill.delay_s)
        victims = self.processes(kill.process)
        if not victims:
            return f"no {kill.process} runs"
        victim = victims[kill.seed % len(victims)]
        self._keep_durable(kill.step)
        committed = self.committed()
        killed = time.monotonic()
        victim.kill()
        if kill.process == "flow":
            self.flow.wait()
            self.restart()
        wrong = self._wait(lambda: self.committed() > committed, "a step after the kill")
        return wrong or time.monotonic() - killed

    def finish(self) -> str:
        """Wait for the end of the run; what went wrong, or nothing."""
        try:
            code = self.flow.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.flow.kill()
            return f"not ended after {DEADLINE_S:.0f} s"
        return "" if code == 0 else f"ended with status {code}"

    def changed_durable(self) -> list[str]:
        """Samples that were durable when something was killed and are not in the log as they were."""
        final: dict[str, str] = {}
        for record in read_steps(self.store, self.run):
            batch = find_batch(self.store, self.run, record.step)
            assert batch is not None
            final |= _rows(read_table(self.store, batch))
        return [name for name, row in self._durable.items() if final.get(name) != row]

    def restart(self) -> None:
        """Start another flow on the run, whatever became of the one before."""
        self.flow = start(self.folder, self.name)

    def stop(self) -> None:
        """End the flow, if it still runs."""
        if self.flow.poll() is None:
            self.flow.kill()
            self.flow.wait()

    def wait_for(self, phase: str, step: int) -> str:
        """Wait until the flow of this session is in ``phase`` of ``step`` or later; or what went wrong."""

        def reached() -> bool:
            status = self.status()
            return (
                status is not None
                and status.pid == self.flow.pid
                and (status.step > step or (status.step == step and status.phase == phase))
            )

        what = f"{phase} of step {step}"
        return self._wait(lambda: self._is_near(step), what) or self._wait(reached, what, POLL_S)

    def wait_until_lease_is_over(self) -> str:
        """Wait until the newest lease has expired; or what went wrong."""

        def over() -> bool:
            try:
                check_fence(
                    self.store, RunRef(self.name, self.run.url, newest_epoch(self.store, self.run))
                )
            except LeaseLostError:
                return True
            return False

        return self._wait(over, "the end of the lease")

    def processes(self, process: str) -> list[psutil.Process]:
        """Those of the training that are called ``process`` in ``VICTIMS``."""
        if process == "flow":
            return [psutil.Process(self.flow.pid)]
        words = VICTIMS[process]
        if process == "prefect server":
            family = [p for p in psutil.process_iter() if _folder_of(p) == str(self.folder)]
        else:
            family = psutil.Process(self.flow.pid).children(recursive=True)
            family += [p for p in psutil.process_iter() if _folder_of(p) == str(self.folder)]
        found = {p.pid: p for p in family if _matches(p, words)}
        return [found[pid] for pid in sorted(found)]

    def _keep_durable(self, step: int) -> None:
        try:
            samples = durable_groups(self.store, self.run, step).samples
        except (FileNotFoundError, ValueError):
            return
        if samples:
            self._durable |= _rows(to_table(samples))

    def _is_near(self, step: int) -> bool:
        """Whether this flow has its engines and the step before ``step`` has begun."""
        status = self.status()
        if status is None or status.pid != self.flow.pid or status.phase == "start engines":
            return False
        return status.step >= step - 1

    def _reached(self, kill: Kill) -> bool:
        run = run_ref(self.store, self.name)
        if kill.phase == "between shards":
            names = self.store.children(batch_folder(run, kill.step))
            return any(name.startswith("part-") for name in names)
        if kill.phase == "after A":
            return find_batch(self.store, run, kill.step) is not None
        if kill.phase == "after B":
            return kill.step in step_numbers(self.store, run)
        status = self.status()
        if status is None or status.step < kill.step:
            return False
        names = {
            "generate": ("generate", "wait"),
            "before A": ("score", "write"),
            "before B": ("commit",),
            "mid-checkpoint": ("checkpoint",),
        }
        return status.step > kill.step or status.phase in names.get(kill.phase, (kill.phase,))

    def committed(self) -> int:
        """Number of steps in the log."""
        return len(step_numbers(self.store, run_ref(self.store, self.name)))

    def _wait(self, condition, what: str, poll_s: float = SLOW_POLL_S) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                return f"waited {DEADLINE_S:.0f} s for {what}"
            if self.flow.poll() not in (None, 0):
                return f"the flow ended with status {self.flow.returncode} before {what}"
            if self.flow.poll() == 0:
                return "" if condition() else f"the run finished before {what}"
            time.sleep(poll_s)
        return ""


def left_behind(folder: Path) -> list[str]:
    """Processes that work in ``folder`` and do not end by themselves, but for the Prefect server."""
    deadline = time.monotonic() + GRACE_S
    while True:
        found = [
            f"{p.pid} {_line(p)[:100]}"
            for p in psutil.process_iter()
            if _folder_of(p) == str(folder) and not _matches(p, VICTIMS["prefect server"])
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(SLOW_POLL_S)


def _matches(process: psutil.Process, words: tuple[str, ...]) -> bool:
    line = _line(process)
    return bool(line) and all(word in line for word in words)


def _line(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def _folder_of(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""


def _rows(table) -> dict[str, str]:
    """What of each sample may never change once durable, by sample id."""
    columns = ("group_id", "index", "response_ids", "rollout_logprobs", "reward", "seed")
    rows = table.select(columns).to_pylist()
    return {f"{r['group_id']}#{r['index']}": repr(r) for r in rows}
