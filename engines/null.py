"""Engines that compute nothing, in the flow's own process: ``cluster.address = "null"``.

They have the verbs of the real ones and write real batches, checkpoints and evaluations, tiny ones,
so that everything around the engines can be measured and tested: orchestration, store, Prefect.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rollflow.storage.checkpoints import (
    checkpoint_folder,
    commit_checkpoint,
    prepare_checkpoint,
    store_files,
)
from rollflow.storage.config import StoreConfig
from rollflow.storage.lease import check_fence
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, CheckpointRef, GroupsRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import FIRST_WEIGHTS

from .megatron.actor import TrainResult
from .weights import PushResult

GROUPS, PER_GROUP = 2, 2
ENGINE = "null"


class NullRollout:
    """Stands in for the rollout manager: four made-up samples a step, the same for the same step."""

    def __init__(self, run: RunRef, store: StoreConfig, *_: object) -> None:
        self._run, self._store = run, Store(store)

    def start(self) -> None:
        """Nothing comes up."""

    def attach_trainer(self, names: Sequence[str], namespace: str, timeout_s: float) -> None:
        """Nothing is asked of the trainer."""

    def generate(self, step: int, policy_version: int) -> GroupsRef:
        """The names of the step's groups."""
        return GroupsRef(self._run, step, GROUPS, GROUPS * PER_GROUP, policy_version)

    def score(self, groups: GroupsRef) -> GroupsRef:
        """The groups as they are: their rewards are made up too."""
        return groups

    def write(self, groups: GroupsRef) -> BatchRef:
        """Write the step's samples: commit point A."""
        return self._commit(groups.step, groups.policy_version, None)

    def evaluate(self, name: str, step: int, policy_version: int) -> BatchRef:
        """Write an evaluation whose reward rises with the step."""
        done = find_batch(self._store, self._run, step, name)
        return done or self._commit(step, policy_version, name)

    def hold(self, version: int) -> tuple[list[str], str]:
        """No server is held."""
        return [], ""

    def release(self, version: int) -> list[str]:
        """No server goes on."""
        return []

    def sleep(self) -> float:
        """No memory is given back."""
        return 0.0

    def stop(self) -> None:
        """Nothing ends."""

    def _commit(self, step: int, version: int, dataset: str | None) -> BatchRef:
        folder = batch_folder(self._run, step, dataset)
        writer = ShardWriter(self._store, self._run, folder)
        samples = [self._sample(step, version, g, i) for g in range(GROUPS) for i in range(2)]
        writer.append(samples)
        reward = sum(s.reward or 0.0 for s in samples) / len(samples)
        prefix = "rollout" if dataset is None else f"eval/{dataset}"
        return commit_batch(
            self._store,
            self._run,
            folder,
            step,
            writer.parts,
            groups=GROUPS,
            policy_versions=[version],
            metrics={f"{prefix}/reward": reward},
            ledger={},
            dataset=dataset,
        )

    def _sample(self, step: int, version: int, group: int, index: int) -> Sample:
        reward = round(1 - 1 / (1 + step / 10 + group + index), 4)
        return Sample(
            run=self._run.name,
            step=step,
            group_id=f"{step:06d}/null:{group}",
            index=index,
            prompt_id=f"null:{group}",
            source_row=group,
            episode_id=f"{step}-{group}-{index}",
            prompt_text=f"{group}+{index}=",
            response_text=str(group + index),
            prompt_ids=[1, 2],
            response_ids=[3],
            loss_mask=[True],
            rollout_logprobs=[-0.5],
            policy_versions=[version],
            status=Status.COMPLETED,
            finish_reason="stop",
            reward=reward,
            grader=ENGINE,
            label=str(group + index),
            engine=ENGINE,
        )


class NullTrainer:
    """Stands in for a trainer rank: its weights are the digest of the batches that it was given."""

    def __init__(self, rank: int, world_size: int, run: RunRef, store: StoreConfig, *_: object):
        self._run, self._store, self._ranks = run, Store(store), world_size
        self._digest, self._version, self._restored = "0" * 64, 0, FIRST_WEIGHTS

    def address(self, host: str = "127.0.0.1") -> str:
        """No rank meets another."""
        return f"{host}:0"

    def setup(self, master: str) -> None:
        """No model is built."""

    def restore(self, checkpoint: CheckpointRef | None) -> int:
        """Take the checkpoint's digest; gives the next step."""
        if checkpoint:
            self._digest, self._restored = checkpoint.weights_digest, checkpoint.step
            self._version = checkpoint.step + 1
        return self._version

    def train(self, batch: BatchRef) -> TrainResult:
        """Fold the batch's digest into the weights'."""
        check_fence(self._store, self._run)
        self._digest = hashlib.sha256(f"{self._digest}{batch.digest}".encode()).hexdigest()
        self._version = batch.step + 1
        metrics = {"train/loss": 1 / (1 + batch.step), "mismatch/kl": 0.0}
        layout = {"ranks": self._ranks}
        return TrainResult(metrics, self._digest, self._version, layout, self._restored)

    def save(self, step: int, hf: bool = True, wait: bool = True) -> CheckpointRef:
        """Write a checkpoint of one file that holds the digest."""
        if standing := prepare_checkpoint(self._store, self._run, step):
            return standing
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "hf" / "weights.txt"
            file.parent.mkdir()
            file.write_text(self._digest)
            target = checkpoint_folder(self._run, step)
            files = store_files(self._store, target, Path(folder), ["hf/weights.txt"])
        return commit_checkpoint(self._store, self._run, step, self._digest, files)

    def push_weights(self, urls: list[str], version: int, place: str = "") -> PushResult:
        """Nobody takes the weights."""
        return PushResult(version, self._digest, 0, 0.0)

    def stop(self) -> None:
        """Nothing ends."""
