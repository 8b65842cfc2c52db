"""Trainer and server with a GPU each: weights are broadcast by NCCL, and a server that dies in the middle is left."""

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rollflow.engines.channel import Channel
from rollflow.engines.config import ModelConfig
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from rollflow.flows.recipes import arithmetic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs"),
    pytest.mark.timeout(580),
]

STEPS = 4
MODEL = ".rollflow/arithmetic-gpu"
WORDS = (
    *("--steps", str(STEPS), "--model.random_weights", "true", "--evals", "[]"),
    *("--trainer.lr_decay_style", "constant", "--trainer.lr_warmup_steps", "0"),
    *("--rollout.batch_size", "16", "--checkpoint.hf", "false", "--cluster.colocate", "false"),
    *("--rollout.reward", "rollflow.flows.recipes.throughput:share_of_even_tokens"),
    *("--sglang.mem_fraction_static", "0.3", "--model.path", f"{MODEL}/model", "--name", "split"),
)
TRAIN = """
import asyncio, json, sys
from rollflow.flows import server
from rollflow.flows.arguments import load_config, recipes
server.use_server()
from rollflow.flows.train import train
summary = asyncio.run(train(load_config(recipes()["arithmetic_gpu"], sys.argv[1:])))
print(json.dumps(summary.perf))
"""


def test_a_run_broadcasts_each_step_s_weights_and_the_server_holds_them(tmp_path):
    """A push whose checksums differ would stop the run."""
    arithmetic.make(tmp_path / MODEL, model=arithmetic.GPU_MODEL)
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, *WORDS],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    finally:
        down = [sys.executable, "-m", "rollflow", "down"]
        subprocess.run(down, cwd=tmp_path, check=False, capture_output=True)
    steps = json.loads(done.stdout.splitlines()[-1])
    assert len(steps) == STEPS
    parts = [{k: v for k, v in step.items() if "sync" in k} for step in steps]
    print(json.dumps({"card": torch.cuda.get_device_name(), "pushes": parts}))
    assert min(step["perf/sync_broadcast_s"] for step in steps) > 0
    assert max(step["perf/sync_join_s"] for step in steps[1:]) < 0.1


class Server:
    """A server on the second GPU."""

    def __init__(self, folder, name):
        self.lease = PortLease()
        self.url = f"http://127.0.0.1:{self.lease.port}"
        model = ModelConfig(
            path=str(folder / MODEL / "model"), dtype="bfloat16", random_weights=True
        )
        table = {
            "mem_fraction_static": 0.2,
            "disable_cuda_graph": True,
            "grammar_backend": "none",
            "base_gpu_id": 1,
        }
        arguments = server_arguments(model, table, "cuda", port=self.lease.port, seed=0)
        self.process = OwnedProcess("server", arguments, folder / f"{name}.log", "cuda")

    async def up(self):
        await wait_until_up("server", self.process, f"{self.url}/model_info", 240)

    def end(self):
        self.process.kill()
        self.lease.release()


async def test_a_server_that_is_killed_in_the_middle_is_named_and_its_successor_gets_the_weights(
    tmp_path, monkeypatch
):
    # As the trainer has it: NCCL reads these when it is first used.
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    arithmetic.make(tmp_path / MODEL, model=arithmetic.GPU_MODEL)
    config = AutoConfig.from_pretrained(tmp_path / MODEL / "model")
    model = AutoModelForCausalLM.from_config(config).to("cuda:0", torch.bfloat16)
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    torch.cuda.set_device(0)

    def killing(victim):
        for i, tensor in enumerate(named):
            if i == len(named) // 2:
                victim.process.kill()
            yield tensor

    servers = [Server(tmp_path, name) for name in ("first", "second")]
    try:
        for server in servers:
            await server.up()
        first, second = (server.url for server in servers)
        with contextlib.closing(Channel("nccl", 60)) as channel:
            assert channel.push(named, [first], 1, bucket_bytes=8 << 20).servers == (first,)
            started = time.monotonic()
            failed = channel.push(killing(servers[0]), [first], 2, bucket_bytes=8 << 20).failed
            given_up_s = time.monotonic() - started
            assert [url for url, _ in failed] == [first]
            again = channel.push(named, [second], 2, bucket_bytes=8 << 20)
            assert again.servers == (second,)
        print(json.dumps({"given_up_s": round(given_up_s, 2), "reason": failed, **again.parts}))
        assert given_up_s < 30
    finally:
        for server in servers:
            server.end()
