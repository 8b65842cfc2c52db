"""Settings that the engines share: the model, and the Ray cluster they live on."""

from typing import Literal

from pydantic import Field

from rollflow.storage.config import Config


class ModelConfig(Config):
    """The policy: a Hugging Face checkpoint folder (config.json, tokenizer, safetensors)."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in both engines. Use float32 on a CPU."""
    random_weights: bool = False
    """Start from random weights (config.json and tokenizer are enough)."""
    trust_remote_code: bool = False


class ClusterConfig(Config):
    """The Ray cluster. By default a private one on loopback, which ends with the run."""

    address: str = "local"
    """``local``, or the address of a running cluster (``host:6379``, ``auto``)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Deadline for Ray and for each engine to come up."""
