"""What the benches measure of an engine alone."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rollflow.engines.conversion.config import ConvertConfig

_CONVERT = """
import dataclasses, json, sys
from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.convert import convert
print(json.dumps(dataclasses.asdict(convert(ConvertConfig.model_validate_json(sys.argv[1])))))
"""


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
    command = [sys.executable, "-W", "ignore", "-c", _CONVERT, config.model_dump_json()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"conversion of {config.source} failed: {done.stderr[-800:]}")
    return done.stdout.strip().splitlines()[-1]
