"""Memory and time of converting a checkpoint that is larger than what the conversion may hold."""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from rollflow.tasks.convert import ConvertConfig
from rollflow.tasks.measure import convert_alone, make_large_checkpoint

SIZE = 4 << 30
LIMIT = 1.5 * 2**30


async def measure(console: Console) -> dict[str, Any]:
    """Hugging Face to torch_dist and back, each in a process of its own, every tensor verified."""
    with tempfile.TemporaryDirectory(prefix="rollflow-bench-") as folder:
        source, dist, back = (Path(folder) / name for name in ("source", "dist", "back"))
        written = await asyncio.to_thread(make_large_checkpoint, source, SIZE)
        facts: dict[str, Any] = {"bytes": written}
        for start, end in ((source, dist), (dist, back)):
            config = ConvertConfig(source=str(start), target=str(end), verify=True)
            done = json.loads(await asyncio.to_thread(convert_alone, config))
            facts[done["kind"]] = {
                "peak_bytes": done["peak_bytes"],
                "seconds": done["seconds"],
                "verified": done["verified"],
            }
            console.print(
                f"{written / 2**30:.2f} GiB to {done['kind']}: peak memory "
                f"{done['peak_bytes'] / 2**20:.0f} MiB, {done['seconds']:.0f} s, "
                f"{done['verified']} tensors verified"
            )
            shutil.rmtree(start)
    peak = max(facts[kind]["peak_bytes"] for kind in ("torch_dist", "huggingface"))
    console.print(f"under 1.5 GiB: {'yes' if peak < LIMIT else 'no'}")
    return facts
