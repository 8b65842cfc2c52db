"""Tiny real models, batches in a real store, and trainer ranks: one here, or several processes."""

import gc
import importlib
import multiprocessing
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Listener
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of each package that is not there
    from rollflow.engines.platform import detect

    detect("cpu").import_megatron()  # as a rank does: without the compiler
    import torch
    from megatron.core import dist_checkpointing  # noqa: F401
    from transformers import (
        Glm4Config,
        Glm4ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    from rollflow.engines.megatron import rank  # noqa: F401

from rollflow.engines.algorithms.config import GrpoConfig
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.megatron.config import GatesConfig, TrainerConfig
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import batch_folder, commit_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.samples import Sample, Status
from rollflow.storage.shards import ShardWriter

RANK_PROCESS = "tests.engines.megatron.rank_process"
VOCAB = 24
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "glm4": (Glm4Config, Glm4ForCausalLM, {"head_dim": 16, "pad_token_id": 0}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            # Deprecations inside megatron-core and torch.distributed.checkpoint, not of our calls.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:megatron"))
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:mbridge"))
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:torch"))


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left() -> Iterator[None]:
    """Process groups that a test left behind would keep the machine's cores busy to the end."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a Hugging Face checkpoint with weights in which every mapping mistake shows."""

    def make(family: str = "qwen3", **config: Any) -> Path:
        config_class, model_class, extra = FAMILIES[family]
        settings = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
        }
        torch.manual_seed(0)
        model = model_class(config_class(**{**settings, **extra, **config})).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model()


def draw_samples(step: int, groups: int = 4, per_group: int = 3, **changes: Any) -> list[Sample]:
    """Ragged samples with random tokens and rewards, the same for the same step."""
    draw = random.Random(step)
    samples: list[Sample] = []
    for g in range(groups):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 7))]
        for index in range(per_group):
            response = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
            fields: dict[str, Any] = {
                "run": "r",
                "step": step,
                "group_id": f"{step:06d}/p{g}",
                "index": index,
                "prompt_id": f"p{g}",
                "source_row": g,
                "episode_id": f"{g}-{index}",
                "prompt_text": "",
                "response_text": "",
                "prompt_ids": prompt,
                "response_ids": response,
                "loss_mask": [True] * len(response),
                "rollout_logprobs": [-3.0] * len(response),
                "policy_versions": [step] * len(response),
                "status": Status.COMPLETED,
                "finish_reason": "stop",
                "reward": float(draw.random() < 0.5),
            }
            samples.append(Sample(**{**fields, **changes}))
    return samples


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[Sample]]:
    return draw_samples


class Run:
    """A run in a store of its own, with batches committed in it."""

    def __init__(self, folder: Path) -> None:
        self.config = StoreConfig(url=str(folder))
        self.store = Store(self.config)
        self.ref = RunRef("r", self.store.run_url("r"))

    def commit(self, step: int, samples: list[Sample] | None = None) -> BatchRef:
        writer = ShardWriter(self.store, self.ref, batch_folder(self.ref, step))
        writer.append(draw_samples(step) if samples is None else samples)
        return commit_batch(
            self.store,
            self.ref,
            writer.folder,
            step,
            writer.parts,
            groups=4,
            policy_versions=[step],
            metrics={},
            ledger={},
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "store")


Settings = dict[str, Any]


def rank_arguments(
    number: int, world_size: int, run: Run, model_path: Path, changes: Settings
) -> tuple[Any, ...]:
    settings: Settings = {
        "model": ModelConfig(path=str(model_path)),
        "trainer": TrainerConfig(step_timeout_s=120),
        "megatron": {"lr": 1e-3},
        "algorithm": GrpoConfig(),
        "gates": GatesConfig(logprob_gap_max=100.0),
        "temperature": 1.0,
        "total_steps": 10,
    }
    settings |= changes
    return (number, world_size, run.ref, run.config, *settings.values(), "cpu")


@pytest.fixture
def one_rank(run: Run, model_path: Path) -> Callable[..., Any]:
    """``with one_rank(algorithm=...) as rank``: a trainer of one rank in this process, at step 0."""

    @contextmanager
    def start(**changes: Any) -> Iterator[TrainerRank]:
        rank = TrainerRank(*rank_arguments(0, 1, run, model_path, changes))
        rank.setup(rank.address())
        try:
            rank.restore(None)
            yield rank
        finally:
            rank.stop()

    return start


class Processes:
    """Processes that hold trainer ranks; started when first needed, kept for the whole session."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([RANK_PROCESS])
        self.connections: list[Any] = []

    def at_least(self, count: int) -> list[Any]:
        starting = [self._start(n) for n in range(len(self.connections), count)]
        self.connections += [self._join(*one) for one in starting]
        return self.connections[:count]

    def _start(self, number: int) -> tuple[Listener, BaseProcess]:
        address = f"{self._folder}/{number}"
        listener = self._stack.enter_context(Listener(address))
        main = importlib.import_module(RANK_PROCESS).main
        process = self._context.Process(target=main, args=(address,), daemon=True)
        process.start()
        return listener, process

    def _join(self, listener: Listener, process: BaseProcess) -> Any:
        self._stack.callback(process.join, 60)
        connection = self._stack.enter_context(listener.accept())
        self._stack.callback(connection.send, None)
        return connection

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    held = Processes(tmp_path_factory.mktemp("ranks"))
    yield held
    held.close()


class Ranks:
    """Trainer ranks in processes of their own; a call goes to all of them."""

    def __init__(self, connections: list[Any]) -> None:
        self._connections = connections

    def call(self, method: str, *args: Any, only: int | None = None) -> list[Any]:
        told = self._connections if only is None else [self._connections[only]]
        for connection in told:
            connection.send((method, args))
        return self._answers(told)

    def each(self, name: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """A function of ``rank_tasks``, with arguments of its own for each process."""
        for connection, one in zip(self._connections, arguments, strict=True):
            connection.send(("do", (name, *one)))
        return self._answers(self._connections)

    def make(self, arguments: list[tuple[Any, ...]]) -> None:
        for connection, one in zip(self._connections, arguments, strict=True):
            connection.send(("new", one))
        self._answers(self._connections)

    def _answers(self, told: list[Any]) -> list[Any]:
        answers = [connection.recv() for connection in told]
        errors = [error for _, error in answers if error]
        assert not errors, errors
        return [answer for answer, _ in answers]


@pytest.fixture
def many_ranks(run: Run, model_path: Path, processes: Processes) -> Callable[..., Any]:
    """``with many_ranks(2) as ranks``: that many processes, at step 0."""

    @contextmanager
    def start(world_size: int, **changes: Any) -> Iterator[Ranks]:
        ranks = Ranks(processes.at_least(world_size))
        ranks.make(
            [rank_arguments(n, world_size, run, model_path, changes) for n in range(world_size)]
        )
        try:
            [master] = ranks.call("address", only=0)
            ranks.call("setup", master)
            ranks.call("restore", None)
            yield ranks
        finally:
            ranks.call("stop")

    return start
