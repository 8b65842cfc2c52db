"""A trainer that broadcasts its weights, and the fleet that replaces a server which dies meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from rollout_parts import RolloutParts, as_sample, ask, logprob_gap
from transformers import Qwen3ForCausalLM

from rollflow.engines import cluster
from rollflow.engines.channel import Channel
from tests.engines import deaths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checksums of a CPU server"),
]


class BroadcastTrainer:
    """Answers like a trainer rank: its weights are those of a checkpoint folder."""

    def __init__(self, folder: str) -> None:
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.named = [(name, p.detach()) for name, p in model.named_parameters()]
        self.channel = Channel("gloo", 30)
        self.victim = 0
        """Process that is killed in the middle of the next push; 0 for none."""
        self.pushed: list[tuple[list[str], int, list[str]]] = []

    def kill_next_time(self, pid: int) -> None:
        self.victim = pid

    def push_weights(self, urls: list[str], version: int, place: str = "") -> Any:
        result = self.channel.push(self.weights(), urls, version, bucket_bytes=1 << 14)
        self.pushed.append((urls, version, [url for url, _ in result.failed]))
        return result

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, named in enumerate(self.named):
            if i == len(self.named) // 2 and self.victim:
                deaths.kill(psutil.Process(self.victim).children(recursive=True))
                self.victim = 0
            yield named

    def pushes(self) -> list[tuple[list[str], int, list[str]]]:
        return self.pushed


def push(trainer: Any, urls: list[str], version: int) -> Any:
    return ray.get(trainer.push_weights.remote(urls, version))


def test_a_server_that_dies_in_the_middle_of_a_push_and_the_others_get_the_weights_after_all(
    rollout: RolloutParts, ray_cluster: Path
):
    cluster.start_actor(BroadcastTrainer, "trainer-0", str(rollout.models[1]))
    trainer = cluster.find_actor("trainer-0")
    rollout.call("attach_trainer", ["trainer-0"], "rollout-tests")
    first, second = rollout.urls
    assert push(trainer, [first, second], 1).servers == (first, second)
    before = rollout.call("info")
    ray.get(trainer.kill_next_time.remote(before.pids[0]))
    result = push(trainer, [first, second], 2)
    assert dict(result.failed).keys() == {first, second}
    assert first in dict(result.failed)[second]
    rollout.call("score", rollout.call("generate", 1, 2))
    ray.get(rollout.manager.info.remote(whole=True), timeout=240)
    rollout.call("score", rollout.call("generate", 2, 2))
    after = rollout.call("info")
    assert before.pids[0] not in after.pids
    third = next(url for url in after.server_urls if url != second)
    later = ray.get(trainer.pushes.remote())[2:]
    assert {urls[0] for urls, _, failed in later if not failed} >= {second, third}
    both = push(trainer, after.server_urls, 3)
    assert both.servers == tuple(after.server_urls)
    for url in after.server_urls:
        answer = ask(url)
        assert answer["meta_info"]["weight_version"] == "3"
        assert logprob_gap(rollout.models[1], [as_sample(answer)]) < 1e-4
