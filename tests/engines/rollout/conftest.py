"""A tiny model, prompts, and one private Ray with one rollout engine for the tests that need it."""

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rollflow.engines import cluster
from rollflow.engines.config import ClusterConfig
from rollflow.engines.rollout.manager import RolloutManager

sys.path.insert(0, str(Path(__file__).parent))

from external_parts import Engine
from rollout_parts import VICTIM, RolloutParts

CHARACTERS = "0123456789+= "


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random Qwen3 checkpoints that differ in their weights only, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab = {"<pad>": 0, "<eos>": 1} | {c: i for i, c in enumerate(CHARACTERS, start=2)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    folders = tmp_path_factory.mktemp("model-a"), tmp_path_factory.mktemp("model-b")
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 additions, one a line."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{a}+{a + 7}=", "label": str(2 * a + 7)} for a in range(10, 50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private Ray on loopback, for one file: another may start one too; gives the file that names the server to be killed."""
    victim = tmp_path_factory.mktemp("victim") / "pid"
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", VICTIM)}
    paths = [str(Path(__file__).parent), *filter(None, [before["PYTHONPATH"]])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[VICTIM] = str(victim)
    ref = cluster.connect(ClusterConfig(), "rollout-tests")
    yield victim
    cluster.disconnect(ref)
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def rollout(
    ray_cluster: Path,
    models: tuple[Path, Path],
    prompts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RolloutParts:
    """A started engine of two servers; ends with Ray."""
    parts = RolloutParts(tmp_path_factory.mktemp("rollout"), models, prompts_file)
    cluster.start_actor(RolloutManager, "rollout", *parts.arguments, max_concurrency=64)
    parts.manager = cluster.find_actor("rollout")
    parts.call("start")
    return parts


@pytest.fixture
async def engines(rollout: RolloutParts) -> AsyncIterator[list[Engine]]:
    """Two engines of somebody else, each before a real server."""
    found = [Engine(url) for url in rollout.urls]
    for engine in found:
        await engine.live()
    yield found
    for engine in found:
        await engine.stop()
