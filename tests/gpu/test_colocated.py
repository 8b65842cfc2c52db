"""The loop on one GPU that trainer and server share: it runs, gives memory back, and can be redone."""

import json
import subprocess
import sys

import pytest
import torch

from rollflow.engines.gpu.server_sums import checksums
from rollflow.engines.weights_on_gpu import GpuTally, word_sum
from rollflow.flows.recipes import arithmetic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.timeout(480),
]

STEPS = 4
WORDS = (
    *("--steps", str(STEPS), "--model.random_weights", "true", "--evals", "[]"),
    *("--trainer.lr_decay_style", "constant", "--trainer.lr_warmup_steps", "0"),
    *("--rollout.batch_size", "16", "--checkpoint.hf", "false"),
    *("--rollout.reward", "rollflow.flows.recipes.throughput:share_of_even_tokens"),
    *("--model.path", ".rollflow/arithmetic-gpu/model", "--name", "colocated"),
)
METRICS = """
import json
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.steps import read_steps
store = Store(StoreConfig())
print(json.dumps([s.metrics for s in read_steps(store, open_run(store, "colocated"))]))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Metrics of each step of a short run."""
    folder = tmp_path_factory.mktemp("colocated")
    files = folder / ".rollflow/arithmetic-gpu"
    arithmetic.make(files, model=arithmetic.GPU_MODEL)
    rollflow(folder, "train", "arithmetic_gpu", *WORDS)
    yield Steps(folder)
    rollflow(folder, "down")


class Steps:
    def __init__(self, folder):
        self.folder = folder
        done = subprocess.run(
            [sys.executable, "-c", METRICS], cwd=folder, capture_output=True, check=True
        )
        self.metrics = json.loads(done.stdout.splitlines()[-1])


def rollflow(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "rollflow", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_an_iteration_runs_and_trainer_and_server_compute_the_same_policy(steps):
    assert len(steps.metrics) == STEPS
    for metrics in steps.metrics:
        assert metrics["mismatch/logprob_gap_mean"] < 0.02
        assert metrics["mismatch/kl"] < 0.002


def test_a_sleeping_server_leaves_the_gpu_to_the_trainer_and_nothing_piles_up(steps):
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    free, kept = ([m[f"perf/gpu_{what}_gib"] for m in steps.metrics] for what in ("free", "kept"))
    # Of the half that the server had, its process keeps a context and little else.
    assert min(free) > 0.9 * total_gib
    assert max(free[1:]) - min(free[1:]) < 0.1
    assert max(kept[1:]) - min(kept[1:]) < 0.1


def test_training_the_log_again_gives_bit_equal_weights(steps):
    assert min(m["train/grad_norm"] for m in steps.metrics) > 0
    assert "log: 0 differences" in rollflow(steps.folder, "audit", "colocated", "--recompute")


def test_the_gpu_sums_words_as_the_cpu_does():
    tensors = [torch.randn(shape).bfloat16() for shape in ((7,), (1000, 33), (300, 7001))]
    for tensor in tensors:
        assert word_sum(tensor.cuda()) == word_sum(tensor)


def test_checksums_are_those_that_sglang_computes():
    from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

    shapes = [(1,), (7,), (2 * 8192,), (3, 8193), (1024, 1024), (151936, 64)]
    tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    assert checksums(tensors) == [f"{gpu_tensor_hash(t):016x}" for t in tensors]
    small = [t.cpu() for t in tensors[:4]]
    assert checksums(small) == checksums(tensors)[:4]


def test_a_tally_tells_the_checksums_of_what_servers_fuse():
    q, k, v = (torch.randn(rows, 64, device="cuda").bfloat16() for rows in (64, 32, 32))
    tally = GpuTally(for_servers=True)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        tally.add(f"model.layers.0.self_attn.{name}_proj.weight", tensor)
    [found] = tally.server_checksums().items()
    assert found == (
        "model.layers.0.self_attn.qkv_proj.weight",
        checksums([torch.cat([q, k, v])])[0],
    )
