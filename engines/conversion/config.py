"""Settings of a conversion."""

from pydantic import Field

from rollflow.storage.config import Config


class ConvertConfig(Config):
    """A checkpoint in another format. What ``source`` is decides the direction."""

    source: str
    """A Hugging Face folder, or a torch_dist checkpoint: a folder or any fsspec URL."""
    target: str
    """Folder or fsspec URL to write to. What an interrupted conversion left there is gone on from;
    what is converted already stays as it is."""
    model: str = ""
    """Folder with config.json and tokenizer, where a torch_dist checkpoint has none beside it."""
    part_bytes: int = Field(default=256 << 20, gt=0)
    """A part of a torch_dist checkpoint is written and checked off after so many bytes."""
    shard_bytes: int = Field(default=4 << 30, gt=0)
    """Largest safetensors file; it is written as it comes, not kept in memory."""
    verify: bool = False
    """Read the result back and compare every tensor's checksum with the source's."""
    trust_remote_code: bool = False
