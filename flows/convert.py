"""The conversion of a checkpoint, as a workflow."""

from prefect import flow

from rollflow.tasks.convert import ConvertConfig, Converted, convert_checkpoint
from rollflow.tasks.events import end_told
from rollflow.tasks.restarts import refuse_crash_loop


@flow(name="convert", flow_run_name="convert to {config.target}")
async def convert(config: ConvertConfig) -> Converted:
    """Hugging Face to torch_dist, or torch_dist to Hugging Face; the source decides which."""
    await refuse_crash_loop(f"conversion to {config.target}")
    with end_told():
        return await convert_checkpoint(config)
