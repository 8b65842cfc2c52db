"""A rank that is up: model, optimizer and process groups, and what can be done with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from rollflow.engines import channel as channels
from rollflow.engines import meeting, weights
from rollflow.engines.algorithms.config import AlgorithmConfig, SftConfig, own_function
from rollflow.engines.algorithms.policy import needs
from rollflow.engines.channel import Channel
from rollflow.engines.checksums import Named, Tally, tally_of, weights_digest
from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import load_hook
from rollflow.engines.platform import detect
from rollflow.engines.published import Publication
from rollflow.engines.weights import PushResult
from rollflow.engines.weights_on_gpu import BUCKET_BYTES, GpuTally, cuda_ipc
from rollflow.storage.objects import Store
from rollflow.storage.refs import CheckpointRef, RunRef
from rollflow.storage.samples import Sample

from . import parallel
from .checkpoint import Saving, load_checkpoint, save_checkpoint
from .config import GatesConfig, TrainerConfig
from .critic import Critic, build_critic
from .determinism import require_determinism
from .export import export_weights
from .learner import Learner
from .memory import Turns
from .model import build_model
from .optimizer import build_optimizer
from .reference import Reference
from .settings import split_settings
from .start import load_weights
from .step import train_on
from .validation import validation_loss


class Rank:
    """See :class:`.actor.TrainerRank`, which counts versions and reads batches."""

    def __init__(
        self,
        learner: Learner,
        model: ModelConfig,
        shares_gpu: bool = False,
        channel: Channel | None = None,
    ) -> None:
        self._learner, self._model, self._shares_gpu = learner, model, shares_gpu
        self._channel = channel
        """To servers that have GPUs of their own, where this rank pushes to such."""
        self._memory = Turns(shares_gpu=shares_gpu)
        self._counted: Tally | GpuTally | None = None
        """Checksums of the weights as they are, where they are on a GPU and known."""
        self._exported: list[Named] = []
        """These weights under their Hugging Face names, until they are pushed."""
        self._parcels: weights.Parcels | None = None
        """Of these, the first one packed."""
        self._pushes = False
        """Whether there are servers to push to."""

    @classmethod
    def join(
        cls,
        rank: int,
        world_size: int,
        master: str | meeting.TCPStore,
        *,
        model: ModelConfig,
        trainer: TrainerConfig,
        megatron: dict[str, Any],
        algorithm: AlgorithmConfig,
        gates: GatesConfig,
        temperature: float,
        total_steps: int,
        device: str,
        shares_gpu: bool = False,
    ) -> Rank:
        """Meet the other ranks at ``master`` and build everything; ``temperature`` 0 counts as 1.

        ``shares_gpu``: memory that a step does not need any more is a server's.
        """
        platform = detect("cuda" if device == "cuda" else "cpu")
        if platform.device == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        elif trainer.deterministic:
            require_determinism()
        settings = split_settings(megatron)
        settings.data_parallel(world_size)
        timeout_s = trainer.step_timeout_s
        store = meeting.connect_store(master, timeout_s) if isinstance(master, str) else master
        parallel.join(store, rank, world_size, backend=platform.backend, timeout_s=timeout_s)
        parallel.make_groups(settings, trainer.seed, timeout_s=timeout_s)
        built = build_model(model, settings, platform.device, router_replay=trainer.router_replay)
        if trainer.ref_load:
            load_weights(built, trainer.ref_load)
        reference = Reference(built) if needs(algorithm).ref_logprobs else None
        if trainer.load:
            load_weights(built, trainer.load)
        # After the weights: an optimizer of bfloat16 weights copies them.
        optimizer, scheduler = build_optimizer(built, settings, trainer, total_steps)
        learner = Learner(
            model=built,
            optimizer=optimizer,
            scheduler=scheduler,
            reference=reference,
            algorithm=algorithm,
            trainer=trainer,
            gates=gates,
            temperature=temperature or 1.0,
            device=platform.device,
            critic=_critic(algorithm, model, settings, trainer, total_steps, platform.device),
            own_advantage=_own(algorithm, "advantage"),
            own_loss=_own(algorithm, "loss"),
        )
        splits = platform.device == "cuda" and not shares_gpu and rank == 0
        channel = Channel(platform.own_backend, trainer.push_timeout_s) if splits else None
        return cls(learner, model, shares_gpu, channel)

    def describe(self) -> dict[str, Any]:
        """Facts about the rank, for reports."""
        parameters = (p for chunk in self._learner.model.chunks for p in chunk.parameters())
        return {
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "pid": os.getpid(),
            "parameters": sum(p.numel() for p in parameters),
            "dtype": self._learner.model.dtype_name,
        }

    @property
    def transformer_config(self) -> Any:
        """megatron-core's TransformerConfig of the policy."""
        return self._learner.model.bridge.config

    def train(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """One batch; the metrics."""
        self._forget()
        with self._memory.step() as taken:
            metrics = train_on(self._learner, samples, step)
        return metrics | taken

    def loss_of(self, samples: Sequence[Sample]) -> dict[str, float]:
        """See :func:`.validation.validation_loss`."""
        return validation_loss(self._learner, samples)

    def digest(self, like: str = "") -> str:
        """Name of the weights as they are, of the kind of ``like``. All ranks take part."""
        if like or not self._keeps_export():
            return weights_digest(export_weights(self._learner.model), like)
        if self._counted is None:
            self._exported = list(export_weights(self._learner.model))
            self._counted = tally_of(self._exported, for_servers=True)
        digest = self._counted.digest()
        self._pack()
        return digest

    def _keeps_export(self) -> bool:
        """Whether weights under their Hugging Face names are kept from the digest to the push. Those that
        several ranks hold are not: all of them at once would be a model more on the GPU."""
        splits = self._channel is not None and self._pushes
        return self._shares_gpu or (splits and dist.get_world_size() == 1)

    def _pack(self) -> None:
        """Make ready what a push begins with: a server on this GPU takes its memory back meanwhile, those
        on others still generate."""
        if self._pushes and self._exported and self._parcels is None:
            self._parcels = weights.Parcels(self._exported, *self._way)
            self._parcels.pack()

    @property
    def _way(self) -> tuple[weights.Transport, int]:
        """How weights get to servers: (the transport, bytes of a bucket)."""
        if self._channel is not None:
            return self._channel.transport, channels.BUCKET_BYTES
        if self._shares_gpu:
            return cuda_ipc, BUCKET_BYTES
        return weights.mapped_file, weights.BUCKET_BYTES

    def load(self, store: Store, checkpoint: CheckpointRef) -> None:
        """Go back to a checkpoint.

        Raises:
            ValueError: the weights that came back are not those that were saved.
        """
        self._forget()
        load_checkpoint(self._learner, store, checkpoint)
        if (digest := self.digest(checkpoint.weights_digest)) != checkpoint.weights_digest:
            raise ValueError(
                f"checkpoint {checkpoint.url}: weights {digest} came back where "
                f"{checkpoint.weights_digest} were saved"
            )

    def save(self, store: Store, run: RunRef, step: int, *, hf: bool) -> Saving:
        """Save everything that training goes on from."""
        return save_checkpoint(
            self._learner, store, run, step, self.digest(), model_path=self._model.path, hf=hf
        )

    def push(self, urls: Sequence[str], version: int, place: str) -> PushResult:
        """Send the weights to servers from rank 0; the others only take part in gathering them.

        With a ``place`` it also publishes them there as files.
        """
        sends = dist.get_rank() == 0
        publication = (
            Publication(place, version, Path(self._model.path)) if place and sends else None
        )
        transport, bucket_bytes = self._way
        named = self._exported or export_weights(self._learner.model)
        rest: dict[str, Any] = {
            "counted": self._counted,
            "publication": publication,
            "bucket_bytes": bucket_bytes,
            "parcels": None if publication else self._parcels,
        }
        if self._channel is not None:
            result = self._channel.push(named, urls, version, **rest)
        else:
            rest |= {"timeout_s": self._learner.trainer.push_timeout_s, "transport": transport}
            result = weights.push(named, urls if sends else (), version, **rest)
        self._pushes = sends and bool(urls) and not publication
        self._forget_tensors()
        self._memory.pushed()
        return result

    def _forget(self) -> None:
        """The weights change: what is known of them is of the past."""
        self._counted = None
        self._forget_tensors()

    def _forget_tensors(self) -> None:
        self._exported = []
        if self._parcels is not None:
            self._parcels.close()
            self._parcels = None

    def leave(self) -> None:
        """Take down the process groups."""
        if self._channel is not None:
            self._channel.close()
        for chunk in self._learner.model.chunks:
            for module in chunk.modules():
                # The graph that hangs on it holds the model, where Python's collector cannot see.
                if dispatcher := getattr(module, "token_dispatcher", None):
                    dispatcher.probs = None
        parallel.leave()


def _critic(algorithm: AlgorithmConfig, *rest: Any) -> Critic | None:
    critic = None if isinstance(algorithm, SftConfig) else algorithm.critic
    return build_critic(critic, *rest) if critic else None


def _own(algorithm: AlgorithmConfig, field: Literal["advantage", "loss"]) -> Any:
    """The user's function that the field names, or None where it names one of ours."""
    path = own_function(algorithm, field)
    return load_hook(path, field) if path else None
