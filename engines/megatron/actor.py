"""One trainer rank: the class behind a Ray actor. Importing it loads neither torch nor megatron.

A rank is a plain object, so it runs as well in a test's process. Ranks are called all together,
each call by its verb on every rank; what a call gives is the same on all of them.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollflow.engines.algorithms.config import AlgorithmConfig, own_functions
from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import hook_version
from rollflow.engines.platform import detect
from rollflow.engines.weights import PushResult
from rollflow.storage.config import StoreConfig
from rollflow.storage.lease import check_fence
from rollflow.storage.manifests import read_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, CheckpointRef, RunRef
from rollflow.storage.samples import Sample
from rollflow.storage.steps import FIRST_WEIGHTS

from .config import GatesConfig, TrainerConfig
from .settings import PARALLEL

if TYPE_CHECKING:
    from .checkpoint import Saving
    from .rank import Rank


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training on a batch gave, e.g. ``TrainResult({"train/loss": 0.1}, "ab12...", 8)``."""

    metrics: dict[str, float]
    """Scalars by slash name, over all ranks."""
    weights_digest: str
    version: int
    """Of the weights that came out: the batch's step + 1."""
    layout: dict[str, int] = field(default_factory=dict)
    """``ranks`` and the parallel sizes that were asked for, by megatron-core's names."""
    restored_step: int = FIRST_WEIGHTS
    """Step of the checkpoint that the trainer started from."""
    functions: dict[str, str] = field(default_factory=dict)
    """The user's own ``advantage`` and ``loss``, as ``pkg.mod:fn@<digest of its file>``."""


class TrainerRank:
    """A Megatron rank: it trains on committed batches, saves, restores and pushes its weights."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        run: RunRef,
        store: StoreConfig,
        model: ModelConfig,
        trainer: TrainerConfig,
        megatron: dict[str, Any],
        algorithm: AlgorithmConfig,
        gates: GatesConfig,
        temperature: float,
        total_steps: int,
        device: str,
        shares_gpu: bool = False,
    ) -> None:
        self._rank, self._world_size, self._run = rank, world_size, run
        self._store = Store(store)
        self._settings = (model, trainer, megatron, algorithm, gates, temperature, total_steps)
        self._trainer, self._device, self._shares_gpu = trainer, device, shares_gpu
        self._master: Any = None
        self._live: Rank | None = None
        self._trained: tuple[tuple[int, str], TrainResult] | None = None
        self._updated: tuple[tuple[int, str], dict[str, float]] | None = None
        """Name of the batch trained on last, and its metrics."""
        self._version = 0
        self._restored_step = FIRST_WEIGHTS
        self._functions: dict[str, str] = {}
        self._saving: Saving | None = None

    def address(self, host: str = "127.0.0.1") -> str:
        """Where the ranks meet, ``host:port``; called on rank 0, before :meth:`setup` of all."""
        self._load()
        from rollflow.engines import meeting

        self._master = meeting.open_store(host)
        return f"{host}:{self._master.port}"

    def setup(self, master: str) -> dict[str, Any]:
        """Join the other ranks at ``master``, build the model and load its first weights.

        Gives what there is to know about the rank, for reports.
        """
        self._load()
        from . import parallel
        from .rank import Rank

        model, trainer, megatron, algorithm, gates, temperature, total_steps = self._settings
        try:
            self._live = Rank.join(
                self._rank,
                self._world_size,
                self._master if self._rank == 0 else master,
                model=model,
                trainer=trainer,
                megatron=megatron,
                algorithm=algorithm,
                gates=gates,
                temperature=temperature,
                total_steps=total_steps,
                device=self._device,
                shares_gpu=self._shares_gpu,
            )
        except BaseException:
            parallel.leave()
            raise
        self._functions = _versions(algorithm)
        return self._live.describe()

    def restore(self, checkpoint: CheckpointRef | None) -> int:
        """Go back to a checkpoint, or stay at the first weights; gives the next step."""
        self._trained = self._updated = None
        if checkpoint is None:
            self._version = 0
            self._restored_step = FIRST_WEIGHTS
        else:
            self._rank_live.load(self._store, checkpoint)
            self._version = checkpoint.step + 1
            self._restored_step = checkpoint.step
        return self._version

    def train(self, batch: BatchRef) -> TrainResult:
        """Train on a committed batch, read back from the store.

        The batch trained on last is answered from memory: it is never trained on twice.

        Raises:
            ValueError: the batch is not of the step that comes next.
            GateError: a number that must hold does not.
            ManifestError: the store does not hold what was committed.
            LeaseLostError: this rank belongs to a flow whose lease is over.
        """
        self.update(batch)
        assert self._updated is not None
        name, metrics = self._updated
        if self._trained is None or self._trained[0] != name:
            started = time.perf_counter()
            digest = self._rank_live.digest()
            metrics = metrics | {"perf/digest_s": time.perf_counter() - started}
            result = TrainResult(
                metrics, digest, self._version, self._layout(), self._restored_step, self._functions
            )
            self._trained = (name, result)
        return self._trained[1]

    def update(self, batch: BatchRef) -> None:
        """:meth:`train` up to the last update: what is left for it is the digest of the weights.

        Raises what :meth:`train` does.
        """
        name = (batch.step, batch.digest)
        if self._updated is not None and self._updated[0] == name:
            return
        if batch.step != self._version:
            raise ValueError(
                f"batch of step {batch.step} for weights of version {self._version}; "
                "train on the batches of a run in their order"
            )
        check_fence(self._store, self._run)
        started = time.perf_counter()
        samples = read_batch(self._store, batch)
        read_s = time.perf_counter() - started
        metrics = self._rank_live.train(samples, batch.step)
        self._version = batch.step + 1
        self._updated = (name, metrics | {"perf/read_s": read_s})

    def loss_of(self, samples: list[Sample]) -> dict[str, float]:
        """What labelled samples cost the weights as they are; see :mod:`.validation`."""
        return self._rank_live.loss_of(samples)

    def save(self, step: int, hf: bool = True, wait: bool = True) -> CheckpointRef | None:
        """Save the weights as they are after ``step``, and as a Hugging Face folder if ``hf``.

        Without ``wait`` it returns once all is on this machine's disk, and the way into the store
        goes on beside training; :meth:`saved`, the next save and :meth:`stop` wait for its end.
        """
        if step + 1 != self._version:
            raise ValueError(
                f"checkpoint of step {step} for weights of version {self._version}; "
                "save a step after it was trained and before the next"
            )
        self.saved()
        self._saving = self._rank_live.save(self._store, self._run, step, hf=hf)
        return self.saved() if wait else None

    def saved(self) -> CheckpointRef | None:
        """Wait for the checkpoint on its way into the store, if there is one; its error is raised."""
        saving, self._saving = self._saving, None
        return saving.result() if saving else None

    def push_weights(self, urls: list[str], version: int, place: str = "") -> PushResult:
        """Bring the weights to rollout servers as ``version`` and verify them there.

        Rank 0 sends. A server that cannot be reached is named in the result. ``place``: the URL of
        a folder in which the weights are published too, for servers that load files.

        Raises:
            ValueError: ``version`` is not the version of these weights.
            WeightMismatchError: a server holds something else afterwards.
        """
        if version != self._version:
            raise ValueError(f"push of version {version} from weights of version {self._version}")
        return self._rank_live.push(urls, version, place)

    def stop(self) -> None:
        """Leave the other ranks.

        Each of gloo's process groups has threads that wake up a hundred times a second, until
        nothing refers to the group any more; a model does so in circles.
        """
        if self._live is not None:
            try:
                self.saved()
            finally:
                self._live.leave()
                self._live = None
                gc.collect()

    def _load(self) -> None:
        # A collection meanwhile may fail PyTorch's reading of sources (CPython 3.11.7 and before, gh-106905).
        gc.disable()
        try:
            detect("cuda" if self._device == "cuda" else "cpu").import_megatron()
        finally:
            gc.enable()

    def _layout(self) -> dict[str, int]:
        megatron = self._settings[2]
        sizes = {name: int(megatron[name]) for name in PARALLEL if name in megatron}
        return {"ranks": self._world_size, **sizes}

    @property
    def _rank_live(self) -> Rank:
        if self._live is None:
            raise RuntimeError(f"trainer rank {self._rank} is used before setup() or after stop()")
        return self._live


def _versions(algorithm: AlgorithmConfig) -> dict[str, str]:
    return {field: hook_version(path) for field, path in own_functions(algorithm).items()}
