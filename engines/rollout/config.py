"""Settings of the rollout side: generation, rewards, evaluation."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from rollflow.engines.hooks.signatures import HookKind
from rollflow.storage.config import Config, DataConfig

from .config_servers import (
    KEYED_POLICIES,
    POLICIES,
    PREFILL_POLICIES,
    ExternalConfig,
    GroupConfig,
    JudgeConfig,
    TeacherConfig,
)


class SamplingConfig(Config):
    """How tokens are drawn; SGLang's names."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = -1
    """Draw from so many of the most probable tokens; -1: from all."""
    max_new_tokens: int = Field(default=256, gt=0)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False

    @field_validator("top_k")
    @classmethod
    def _top_k_leaves_a_token(cls, top_k: int) -> int:
        if top_k < -1 or top_k == 0:
            raise ValueError("give 1 or more, or -1 to draw from all tokens")
        return top_k


Mode = Literal["sync", "one_step_ahead", "async"]


class BufferConfig(Config):
    """The data buffer: where groups wait that were begun and put back."""

    priority: str = "first_in"
    """Who is drawn first: ``first_in``, ``oldest_policy``, ``newest_policy``, or ``pkg.mod:fn``."""


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
    """SGLang server processes behind the router, started with the ``[sglang]`` table; 0 where nothing
    is generated (supervised runs without evaluation), and unless given where there are ``groups``."""
    groups: list[GroupConfig] = Field(default_factory=list)
    """Further servers behind the same router, group by group."""
    affinity: Literal["", "group", "episode"] = ""
    """Requests of one group, or of one episode, go to one server as long as it is up: it has their
    prompt in its prefix cache."""
    external: ExternalConfig | None = None
    """Servers that somebody else runs. ``servers = 0`` leaves generation to them alone."""
    teacher: TeacherConfig | None = None
    """For algorithms with a ``teacher_coef``, such as ``distill``: a model with the policy's tokenizer
    that is asked for the log-probability of every token that the policy samples."""
    judge: JudgeConfig | None = None
    """A frozen model for reward and generate functions, which find its URL in the environment variable
    ``ROLLFLOW_REWARD_URL``, and the latter in ``engine.judge_url``."""
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
    """Deadline of one call; the sample, or the group, of a call that is late is failed."""
    reward_retries: int = Field(default=1, ge=0)
    """Times that a reward function that raised is called again, unless ``reward_timeout_s`` has gone since
    it was first asked, waiting included; each call has the whole deadline."""
    reward_workers: int = Field(default=2, gt=0)
    """Processes that run a plain reward function; up to four times as many while calls are slow."""
    reward_memory_gb: float = Field(default=4.0, gt=0)
    """Address space that one of them may take."""

    @property
    def generates(self) -> bool:
        """Whether there is a server to generate with."""
        return self.servers > 0 or bool(self.groups) or self.external is not None

    def tables(self, sglang: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """(name, SGLang's arguments) of each server that we start; ``sglang`` is the ``[sglang]`` table."""
        found = [(f"server-{i}", dict(sglang)) for i in range(self.servers)]
        for group in self.groups:
            table = {**sglang, **group.sglang}
            found += [(f"{group.name}-{i}", table) for i in range(group.servers)]
        return found

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

    @model_validator(mode="before")
    @classmethod
    def _groups_stand_alone(cls, tree: Any) -> Any:
        """Where there are groups, no other server is meant unless ``servers`` says so."""
        if isinstance(tree, dict) and tree.get("groups") and "servers" not in tree:
            return {**tree, "servers": 0}
        return tree

    @model_validator(mode="after")
    def _groups_are_sound(self) -> "RolloutConfig":
        names = [group.name for group in self.groups]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rollout.groups: name {min(twice)!r} is used twice")
        if "server" in names:
            raise ValueError("rollout.groups: 'server' is the name of those of rollout.servers")
        roles = {group.role for group in self.groups}
        if roles <= {""}:
            return self
        others = [group.name for group in self.groups if not group.role]
        if missing := {"prefill", "decode"} - roles:
            raise ValueError(
                f"rollout.groups: no group has the role {min(missing)!r}; a request needs both halves"
            )
        if others or self.servers or self.external:
            which = (
                f"group {others[0]!r}"
                if others
                else f"rollout.servers = {self.servers}"
                if self.servers
                else "rollout.external"
            )
            raise ValueError(
                f"rollout.groups has prefill and decode servers, but {which} does both halves; one "
                "router sends requests either way, not both"
            )
        return self

    @model_validator(mode="after")
    def _modes_are_sound(self) -> "RolloutConfig":
        if self.mode != "sync" and self.staleness < 1:
            raise ValueError(
                f"rollout.max_staleness = {self.staleness} in mode {self.mode!r}, which generates "
                'ahead of training; give 1 or more, or set rollout.mode = "sync"'
            )
        if self.deterministic and self.external is not None:
            raise ValueError(
                "rollout.deterministic = true with rollout.external: how servers of others compute "
                "is not known; leave out one of the two"
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
    "eps_clip": "algorithm.eps_clip",
    "eps_clip_high": "algorithm.eps_clip_high",
    "entropy_coef": "algorithm.entropy_coef",
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


def check_policies(given: Mapping[str, Any], rollout: RolloutConfig) -> None:
    """Refuse policies in the ``[router]`` table that do not do what ``rollout`` asks for."""
    halves = any(group.role for group in rollout.groups)
    policies = {"policy": POLICIES, "prefill_policy": PREFILL_POLICIES, "decode_policy": POLICIES}
    for field, known in policies.items():
        if (given.get(field) or known[0]) not in known:
            raise ValueError(
                f"router.{field} = {given[field]!r} is none of the router's: {', '.join(known)}"
            )
        if field != "policy" and given.get(field) and not halves:
            raise ValueError(
                f"router.{field} = {given[field]!r} is for prefill and decode servers; give "
                "rollout.groups these roles, or set router.policy"
            )
    if rollout.affinity and given.get("policy", KEYED_POLICIES[0]) not in KEYED_POLICIES:
        raise ValueError(
            f"router.policy = {given['policy']!r} knows no routing key, which rollout.affinity = "
            f"{rollout.affinity!r} sends; set it to one of {', '.join(KEYED_POLICIES)}"
        )
