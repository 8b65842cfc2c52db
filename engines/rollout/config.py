"""Settings of the rollout side: generation, rewards, evaluation."""

from collections.abc import Iterable

from pydantic import Field

from rollflow.engines.config import check_names, dataclass_fields
from rollflow.storage.config import Config, DataConfig


class SamplingConfig(Config):
    """How tokens are drawn; SGLang's names."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = -1
    max_new_tokens: int = Field(default=256, gt=0)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False


class RolloutConfig(Config):
    """How a step's batch is generated and scored."""

    batch_size: int = Field(default=32, gt=0)
    """Prompts (groups) per step."""
    n_samples_per_prompt: int = Field(default=8, gt=0)
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    deterministic: bool = False
    """The same seed gives bit-equal tokens and log-probabilities again, whatever runs beside it. On
    a CPU servers then answer one request at a time, which is several times slower; on a GPU SGLang
    uses its batch-invariant kernels."""
    servers: int = Field(default=1, ge=0)
    """SGLang server processes behind the router; 0 where nothing is generated (supervised runs
    without evaluation)."""
    concurrency: int = Field(default=256, gt=0)
    """Samples in flight at once, over all servers."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one generation request."""
    max_retries: int = Field(default=4, ge=0)
    """Times that a request is sent again after an HTTP or server fault."""
    shard_groups: int = Field(default=64, gt=0)
    """A shard is written each time so many groups are finished."""
    generate: str = ""
    """``pkg.mod:fn`` of a custom generate function; empty for one request per sample."""
    reward: str
    """``pkg.mod:fn`` of the reward function."""
    reward_timeout_s: float = Field(default=60.0, gt=0)


class EvalConfig(Config):
    """One evaluation dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    data: DataConfig
    every: int = Field(default=0, ge=0)
    """Evaluate each so many steps, and before the first and after the last; 0: only then."""
    n_samples_per_prompt: int = Field(default=1, gt=0)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    reward: str = ""
    """``pkg.mod:fn``; empty for the training reward."""
    generate: str = ""
    """``pkg.mod:fn``; empty for one plain request per sample, whatever training uses."""

    def due(self, trained: int) -> bool:
        """Whether to evaluate after ``trained`` steps."""
        return self.every > 0 and trained % self.every == 0


SGLANG_OWNED = {
    "model_path": "use model.path",
    "tokenizer_path": "use model.path",
    "host": "servers listen on loopback",
    "port": "ports are chosen free",
    "dtype": "use model.dtype",
    "device": "use cluster.device",
    "trust_remote_code": "use model.trust_remote_code",
    "random_seed": "use rollout.seed",
}
"""SGLang's arguments that rollflow sets, and why or what to use instead."""

ROUTER_OWNED = {
    "worker_urls": "use rollout.servers",
    "host": "the router listens on loopback",
    "port": "the port is chosen free",
}


def check_sglang_names(given: Iterable[str]) -> None:
    """Refuse names that SGLang's ``ServerArgs`` lacks or that rollflow owns."""
    known = dataclass_fields("sglang", "srt/server_args.py", "ServerArgs")
    check_names("sglang", given, known, SGLANG_OWNED)


def check_router_names(given: Iterable[str]) -> None:
    """Refuse names that the router's ``RouterArgs`` lacks or that rollflow owns."""
    known = dataclass_fields("sglang_router", "router_args.py", "RouterArgs")
    check_names("router", given, known, ROUTER_OWNED)
