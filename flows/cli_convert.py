"""``rollflow convert``: checkpoints from one format to another."""

import asyncio
import os

from . import server
from .terminal import Words, console


def convert(
    source: str,
    target: str,
    *words: Words,
    model: str = "",
    verify: bool = False,
    part_bytes: int = 256 << 20,
    shard_bytes: int = 4 << 30,
    trust_remote_code: bool = False,
) -> None:
    """Convert a Hugging Face folder to torch_dist, or a Megatron checkpoint to Hugging Face.

    An interrupted conversion is gone on from; one that is complete is left as it is. Under torchrun
    the checkpoint, of any format and parallel size, is loaded by a trainer of that many ranks and
    leaves through the exporter of the weight sync; --tensor-model-parallel-size 2 and the like then
    say how the ranks are laid out.

    Parameters
    ----------
    source
        Hugging Face folder, torch_dist checkpoint or checkpoint of a run; any fsspec URL.
    target
        where to write; any fsspec URL.
    model
        folder with config.json and tokenizer, where the checkpoint has none beside it.
    verify
        read the result back and compare every tensor.
    part_bytes
        size of a part of a torch_dist checkpoint.
    shard_bytes
        size of a safetensors file.
    trust_remote_code
        run code that the model's folder brings.
    """
    from rollflow.engines.conversion.config import ConvertConfig

    config = ConvertConfig(
        source=source,
        target=target,
        model=model,
        verify=verify,
        part_bytes=part_bytes,
        shard_bytes=shard_bytes,
        trust_remote_code=trust_remote_code,
    )
    if "LOCAL_RANK" in os.environ:
        from rollflow.tasks.convert import export_as_rank

        from .arguments import overlay

        export_as_rank(config, overlay({}, words).get("megatron", {}))
        return
    if words:
        raise ValueError(f"{words[0]} says how ranks are laid out; start the command by torchrun")
    server.use_server()
    from .convert import convert as convert_flow

    done = asyncio.run(convert_flow(config))
    console.print(
        f"{done.kind} in {done.target}: {done.tensors} tensors, {done.bytes / 1e6:.1f} MB"
    )
    if done.resumed_parts:
        console.print(f"  gone on from {done.resumed_parts} parts that were written already")
    if done.verified:
        console.print(f"  verified: {done.verified} tensors read back, each as in the source")
    console.print(f"  {done.seconds:.1f} s, peak memory {done.peak_bytes / 2**20:.0f} MiB")
