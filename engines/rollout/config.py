"""Settings of the rollout side: generation, rewards, evaluation."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from rollflow.engines.config import Setting, check_table, dataclass_settings
from rollflow.engines.hooks.signatures import HookKind
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


Mode = Literal["sync", "one_step_ahead", "async"]


class BufferConfig(Config):
    """The data buffer: where groups wait that were begun and put back."""

    priority: str = "first_in"
    """Who is drawn first: ``first_in``, ``oldest_policy``, ``newest_policy``, or ``pkg.mod:fn``."""


class TeacherConfig(Config):
    """A frozen model that is asked for the log-probability of every token that the policy samples."""

    path: str = ""
    """Hugging Face folder of a model with the policy's tokenizer; servers of its own are started."""
    servers: int = Field(default=1, gt=0)
    """SGLang servers for ``path``, behind a router of their own."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Any field of SGLang's ServerArgs, for these servers."""
    url: str = ""
    """In place of ``path``: an SGLang server or router that runs already, ``http://host:port``."""

    @model_validator(mode="after")
    def _is_one_place(self) -> "TeacherConfig":
        if bool(self.path) == bool(self.url):
            raise ValueError(
                f"rollout.teacher: path = {self.path!r} and url = {self.url!r}; give one of them"
            )
        check_sglang(self.sglang)
        return self


class RolloutConfig(Config):
    """How a step's batch is generated and scored."""

    mode: Mode = "sync"
    """``sync``: generate, then train. ``one_step_ahead``: a step is generated while the one before
    it is trained on; weights change between two steps' generation. ``async``: up to
    ``max_staleness`` steps ahead, and weights change under the answers in flight."""
    max_staleness: int | None = Field(default=None, ge=0)
    """How many versions behind its step a token may be that a batch holds. Never exceeded. Unless
    given 0, 1 and 2 in the three modes."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts (groups) per step."""
    n_samples_per_prompt: int = Field(default=8, gt=0)
    over_sampling_batch_size: int | None = Field(default=None, gt=0)
    """Groups that are begun at once, ``batch_size`` unless given. Those beyond it make up for what
    the dynamic filter drops; what is finished one too many waits in the data buffer."""
    max_waves: int = Field(default=8, gt=0)
    """Times that a step begins so many groups before it gives up finding ``batch_size``."""
    early_stop: bool = False
    """A batch is the first ``batch_size`` groups that are finished; the others are cut off."""
    partial: bool = True
    """What was cut off goes on in a later step; else its prompt is begun anew."""
    mask_stale: bool = False
    """Tokens of older weights than the sample's newest are not trained on."""
    buffer: BufferConfig = BufferConfig()
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    deterministic: bool = False
    """The same seed gives bit-equal tokens and log-probabilities again, whatever runs beside it. On
    a CPU servers then answer one request at a time, which is several times slower; on a GPU SGLang
    uses its batch-invariant kernels."""
    servers: int = Field(default=1, ge=0)
    """SGLang server processes behind the router; 0 where nothing is generated (supervised runs
    without evaluation)."""
    teacher: TeacherConfig | None = None
    """For algorithms with a ``teacher_coef``, such as ``distill``."""
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
    group_reward: bool = False
    """The reward function is given all samples of a group and returns a reward for each."""
    reward_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one call; the sample of a call that is late is failed."""
    reward_retries: int = Field(default=1, ge=0)
    """Times that a reward function that raised is called again, within the same deadline."""
    reward_workers: int = Field(default=2, gt=0)
    """Processes that run a plain reward function; up to four times as many while calls are slow."""
    reward_memory_gb: float = Field(default=4.0, gt=0)
    """Address space that one of them may take."""

    @property
    def ahead(self) -> int:
        """Steps that generation may be ahead of training."""
        return {"sync": 0, "one_step_ahead": 1, "async": self.staleness}[self.mode]

    @property
    def staleness(self) -> int:
        """``max_staleness``, or what the mode has in its place."""
        default = {"sync": 0, "one_step_ahead": 1, "async": 2}[self.mode]
        return default if self.max_staleness is None else self.max_staleness

    @property
    def wave(self) -> int:
        """Groups that are begun at once."""
        return self.over_sampling_batch_size or self.batch_size

    @model_validator(mode="after")
    def _modes_are_sound(self) -> "RolloutConfig":
        if self.mode != "sync" and self.staleness < 1:
            raise ValueError(
                f"rollout.max_staleness = {self.staleness} in mode {self.mode!r}, which generates "
                'ahead of training; give 1 or more, or set rollout.mode = "sync"'
            )
        if self.wave < self.batch_size:
            raise ValueError(
                f"rollout.over_sampling_batch_size = {self.wave} is less than rollout.batch_size = "
                f"{self.batch_size}; a step begins at least what it trains on"
            )
        if self.early_stop and self.wave == self.batch_size:
            raise ValueError(
                "rollout.early_stop = true has nothing to cut off while as many groups are begun as "
                f"are trained on; set rollout.over_sampling_batch_size above {self.batch_size}"
            )
        if self.early_stop and self.partial and self.staleness < 1:
            raise ValueError(
                "rollout.early_stop with rollout.partial: what is cut off goes on in a later step "
                "and is a version old by then; set rollout.max_staleness to 1 or more, or "
                "rollout.partial = false"
            )
        return self


class HooksConfig(Config):
    """Functions of your own, each ``pkg.mod:fn``; engines/README.md shows one of each."""

    reward: str = ""
    """Another name of ``rollout.reward``."""
    generate: str = ""
    """Another name of ``rollout.generate``."""
    dynamic_filter: str = ""
    """Which scored groups are trained on."""
    sample_filter: str = ""
    """Which samples of a group are trained on."""
    sampling: str = ""
    """Sampling parameters of each prompt."""
    buffer_filter: str = ""
    """Which waiting groups may be drawn."""
    curriculum: str = ""
    """The sources' shares at each step."""
    batch_samples: str = ""
    """Sees every committed batch."""
    eval_samples: str = ""
    """Sees every evaluation."""

    def named(self) -> list[tuple[HookKind, str]]:
        """Kind and name of each that is set."""
        kinds: tuple[HookKind, ...] = get_args(HookKind)
        return [(kind, path) for kind in kinds if (path := getattr(self, kind, ""))]


SLIME_NAMES = {
    "custom_rm_path": "hooks.reward",
    "custom_generate_function_path": "hooks.generate",
    "dynamic_sampling_filter_path": "hooks.dynamic_filter",
    "rollout_sample_filter_path": "hooks.sample_filter",
    "buffer_filter_path": "hooks.buffer_filter",
    "rollout_all_samples_process_path": "hooks.batch_samples",
    "custom_rollout_log_function_path": "hooks.batch_samples",
    "custom_eval_rollout_log_function_path": "hooks.eval_samples",
    "group_rm": "rollout.group_reward",
    "over_sampling_batch_size": "rollout.over_sampling_batch_size",
    "n_samples_per_prompt": "rollout.n_samples_per_prompt",
    "partial_rollout": "rollout.early_stop",
    "mask_offpolicy_in_partial_rollout": "rollout.mask_stale",
    "rollout_max_response_len": "rollout.sampling.max_new_tokens",
    "rollout_max_prompt_len": "data.max_prompt_tokens",
    "rollout_temperature": "rollout.sampling.temperature",
    "rollout_top_p": "rollout.sampling.top_p",
    "rollout_top_k": "rollout.sampling.top_k",
    "rollout_stop": "rollout.sampling.stop",
    "rollout_stop_token_ids": "rollout.sampling.stop_token_ids",
    "prompt_data": "data.path",
    "input_key": "data.prompt_key",
    "label_key": "data.label_key",
    "metadata_key": "data.metadata_key",
    "apply_chat_template": "data.apply_chat_template",
    "hf_checkpoint": "model.path",
    "num_rollout": "steps",
}
"""slime's names of settings that mean the same here, and ours."""


class EvalConfig(Config):
    """One evaluation dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    data: DataConfig
    loss: bool = False
    """Measure the trainer's loss on the labels, or on the assistant's messages, in place of answers:
    ``eval/{name}/loss``, in nats per token. Needs no server."""
    every: int = Field(default=0, ge=0)
    """Evaluate each so many steps, and before the first and after the last; 0: only then."""
    delay: int = Field(default=0, ge=0)
    """Steps before which ``every`` does not count."""
    n_samples_per_prompt: int = Field(default=1, gt=0)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    reward: str = ""
    """``pkg.mod:fn``; empty for the training reward."""
    generate: str = ""
    """``pkg.mod:fn``; empty for one plain request per sample, whatever training uses."""
    group_reward: bool | None = None
    """As ``rollout.group_reward``; that of training where the training reward is used."""
    solved_at: float = 1.0
    """A sample whose reward is at least this counts as a pass in ``pass@k``."""

    @model_validator(mode="after")
    def _loss_asks_nobody(self) -> "EvalConfig":
        for field in ("generate", "reward", "group_reward"):
            if self.loss and getattr(self, field):
                raise ValueError(
                    f"evals {self.name!r}: {field} has no effect on a loss of labels; "
                    "drop it, or loss = true"
                )
        return self

    def due(self, trained: int) -> bool:
        """Whether to evaluate after ``trained`` steps."""
        return self.every > 0 and trained >= self.delay and trained % self.every == 0


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


def sglang_settings() -> dict[str, Setting]:
    """Every setting that the ``[sglang]`` table takes; empty without SGLang."""
    return dataclass_settings("sglang", "srt/server_args.py", "ServerArgs")


def router_settings() -> dict[str, Setting]:
    """Every setting that the ``[router]`` table takes; empty without sglang-router."""
    return dataclass_settings("sglang_router", "router_args.py", "RouterArgs")


def check_sglang(given: Mapping[str, Any]) -> None:
    """Refuse names that SGLang's ``ServerArgs`` lacks or rollflow owns, and values of a wrong type."""
    check_table("sglang", given, sglang_settings(), SGLANG_OWNED)


def check_router(given: Mapping[str, Any]) -> None:
    """Refuse names that the router's ``RouterArgs`` lacks or rollflow owns, and values of a wrong type."""
    check_table("router", given, router_settings(), ROUTER_OWNED)
