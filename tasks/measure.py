"""What the benches measure of an engine alone."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.platform import detect

_CONVERT = """
import dataclasses, json, sys
from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.convert import convert
print(json.dumps(dataclasses.asdict(convert(ConvertConfig.model_validate_json(sys.argv[1])))))
"""


_TRAIN = """
import json, sys
from rollflow.engines.megatron.speed import measure
print(json.dumps(measure(**json.loads(sys.argv[1]))))
"""


_GENERATE = """
import asyncio, json, sys
from rollflow.engines.rollout.speed import measure
print(json.dumps(asyncio.run(measure(**json.loads(sys.argv[1])))))
"""


_COPY = """
import torch
source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
target = torch.empty_like(source)
times = []
for _ in range(12):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)
print(2 * source.nbytes / sorted(times)[6])
"""


_LINK = """
import time, torch
source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda:0").random_()
target = torch.empty_like(source, device="cuda:1")
times = []
for _ in range(12):
    for gpu in range(2):
        torch.cuda.synchronize(gpu)
    begun = time.perf_counter()
    target.copy_(source)
    for gpu in range(2):
        torch.cuda.synchronize(gpu)
    times.append(time.perf_counter() - begun)
print(source.nbytes / sorted(times)[6])
"""


def gpu_name() -> str:
    """Name of the GPU that torch sees first; empty where it sees none."""
    if detect().device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name()


def gpu_count() -> int:
    """GPUs that torch sees on this machine."""
    return detect().gpus


def gpu_memory_gib() -> float:
    """Memory of the GPU that torch sees first, in GiB; 0 where it sees none."""
    if detect().device == "cpu":
        return 0.0
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


def train_alone(model_path: str, **settings: Any) -> dict[str, Any]:
    """Training steps in a process of their own, with a GPU to itself; see ``engines.megatron.speed``."""
    return json.loads(_alone(_TRAIN, json.dumps({"model_path": model_path, **settings})))


def generate_alone(model_path: str, **settings: Any) -> dict[str, Any]:
    """What a server generates, asked by us and as it is; see ``engines.rollout.speed``."""
    return json.loads(_alone(_GENERATE, json.dumps({"model_path": model_path, **settings})))


def hbm_bytes_per_s() -> float:
    """What a copy inside the GPU's memory reaches, bytes read plus bytes written; in a process of its own."""
    return float(_alone(_COPY, ""))


def link_bytes_per_s() -> float:
    """What a copy from one GPU to another reaches, in a process of its own."""
    return float(_alone(_LINK, ""))


async def compare_training(model_path: str, steps: int, samples: int) -> dict[str, Any]:
    """Our training step and plain transformers' on the same batches; see ``engines.megatron.compare``."""
    from rollflow.engines.megatron.compare import compare

    return await asyncio.to_thread(compare, model_path, steps, samples)


def make_large_checkpoint(folder: Path, size: int) -> int:
    """A random Qwen3 checkpoint of about ``size`` bytes; its size."""
    from rollflow.engines.conversion.synthetic import make

    return make(folder, size)


def convert_alone(config: ConvertConfig) -> str:
    """Convert in a process of its own, whose peak memory is the conversion's; its result as JSON."""
    return _alone(_CONVERT, config.model_dump_json())


def _alone(program: str, settings: str) -> str:
    """The last line that the program prints."""
    command = [sys.executable, "-W", "ignore", "-c", program, settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{settings} failed: {done.stderr[-800:]}")
    return done.stdout.strip().splitlines()[-1]
