"""Convert a checkpoint to another format."""

import asyncio
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines.conversion.config import ConvertConfig
from rollflow.engines.conversion.result import Converted


def export_as_rank(config: ConvertConfig, megatron: dict[str, Any]) -> None:
    """Be the rank that torchrun's environment names, in an export from any Megatron checkpoint."""
    from rollflow.engines.conversion.exporter import export_under_torchrun

    export_under_torchrun(config, megatron)


@task(name="convert checkpoint", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5)
async def convert_checkpoint(config: ConvertConfig) -> Converted:
    """Stream the tensors over; what an attempt before this one wrote is not written again."""
    from rollflow.engines.conversion.convert import convert

    return await asyncio.to_thread(convert, config)
