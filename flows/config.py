"""RunConfig: everything that decides a run, composed from the settings of each layer."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rollflow.engines.algorithms.config import (
    GROUPED,
    AlgorithmConfig,
    GrpoConfig,
    SftConfig,
)
from rollflow.engines.config import ClusterConfig, ModelConfig
from rollflow.engines.megatron.config import (
    CheckpointConfig,
    GatesConfig,
    TrainerConfig,
    check_megatron,
)
from rollflow.engines.rollout.config import (
    SLIME_NAMES,
    EvalConfig,
    HooksConfig,
    RolloutConfig,
    check_policies,
)
from rollflow.engines.rollout.config_servers import check_router, check_sglang
from rollflow.storage.config import Config, DataConfig, StoreConfig
from rollflow.tasks.config import ReportConfig

__all__ = ["SLIME_NAMES", "RunConfig", "StopConfig"]


class StopConfig(Config):
    """End a run early, once an evaluation is good enough."""

    metric: str
    """Slash name of an evaluation metric, e.g. ``eval/heldout/reward``."""
    at_least: float | None = None
    at_most: float | None = None
    """For a metric that falls, e.g. ``eval/heldout/loss``."""

    @model_validator(mode="after")
    def _has_one_bound(self) -> "StopConfig":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(
                f"stop: at_least = {self.at_least}, at_most = {self.at_most}; give one of them"
            )
        return self

    def satisfied(self, value: float) -> bool:
        """Whether ``value`` of the metric is good enough."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most


class RegressionConfig(Config):
    """What happens when a checkpoint is worse than the best one before it (``checkpoint.evaluate``)."""

    metric: str
    """Slash name of an evaluation metric, e.g. ``eval/heldout/reward``."""
    tolerance: float = Field(ge=0)
    """How much worse than the best it may be."""
    lower_is_better: bool = False
    """For a loss."""
    action: Literal["alert", "stop"] = "alert"
    """``alert``: an event and a warning; ``stop`` also suspends the training after its current step.
    Nothing is lost: resume it, or fork a run from the best checkpoint, which both name."""

    def worse(self, value: float, best: float) -> bool:
        """Whether ``value`` is worse than ``best`` by more than the tolerance."""
        loss = value - best if self.lower_is_better else best - value
        return loss > self.tolerance


class RunConfig(Config):
    """One training run. Tables named after Megatron, SGLang and the router go to them unchanged."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: its folder in the store, its flow run in Prefect."""
    steps: int = Field(gt=0)
    model: ModelConfig
    data: DataConfig
    sources: list[DataConfig] = Field(default_factory=list)
    """Further sources of prompts, mixed with ``data`` by their weights."""
    rollout: RolloutConfig
    hooks: HooksConfig = HooksConfig()
    algorithm: AlgorithmConfig = GrpoConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: list[EvalConfig] = Field(default_factory=list)
    stop: StopConfig | None = None
    regression: RegressionConfig | None = None
    gates: GatesConfig = GatesConfig()
    report: ReportConfig = ReportConfig()
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Any field of megatron-core's TransformerConfig, OptimizerConfig, DistributedDataParallelConfig."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Any field of SGLang's ServerArgs."""
    router: dict[str, Any] = Field(default_factory=dict)
    """Any argument of sglang-router."""

    @model_validator(mode="before")
    @classmethod
    def _hooks_in_their_place(cls, tree: Any) -> Any:
        """``hooks.reward`` and ``hooks.generate`` are read where the rollout has them."""
        hooks = tree.get("hooks") if isinstance(tree, dict) else None
        if not isinstance(hooks, dict) or not isinstance(tree.get("rollout", {}), dict):
            return tree
        moved = {k: hooks[k] for k in ("reward", "generate") if hooks.get(k)}
        rest = {k: v for k, v in hooks.items() if k not in moved}
        return {**tree, "hooks": rest, "rollout": {**tree.get("rollout", {}), **moved}}

    @field_validator("algorithm", mode="before")
    @classmethod
    def _grpo_unless_named(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "grpo", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _passed_on_is_known(self) -> "RunConfig":
        check_megatron(self.megatron)
        check_sglang(self.sglang)
        check_router(self.router)
        check_policies(self.router, self.rollout)
        return self

    @model_validator(mode="after")
    def _algorithm_is_wired(self) -> "RunConfig":
        algorithm = self.algorithm
        asks = algorithm.name != "sft" and algorithm.teacher_coef > 0
        if asks and self.rollout.teacher is None:
            raise ValueError(
                f"algorithm.name = {algorithm.name!r} with teacher_coef above 0 needs rollout.teacher: "
                "give its path or url"
            )
        if self.rollout.teacher is not None and not asks:
            raise ValueError(
                f"rollout.teacher is set but algorithm.name = {algorithm.name!r} has no teacher_coef "
                "above 0; raise it, or leave the teacher out"
            )
        if asks and self.rollout.sampling.temperature != 1:
            raise ValueError(
                f"rollout.sampling.temperature = {self.rollout.sampling.temperature:g} with "
                "algorithm.teacher_coef above 0: the teacher tells its log-probabilities at temperature 1, "
                "which the policy's are compared with; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_learn(self) -> "RunConfig":
        algorithm = self.algorithm
        if isinstance(algorithm, SftConfig):
            return self
        if algorithm.critic and algorithm.critic.warmup_steps >= self.steps:
            raise ValueError(
                f"algorithm.critic.warmup_steps = {algorithm.critic.warmup_steps} of steps = {self.steps}: "
                "the policy would never be trained; make it smaller"
            )
        if self.rollout.generate or not self.rollout.generates or algorithm.teacher_coef:
            return self
        if algorithm.advantage in GROUPED and self.rollout.n_samples_per_prompt == 1:
            raise ValueError(
                "rollout.n_samples_per_prompt = 1 with algorithm.advantage = "
                f"{algorithm.advantage!r}, which compares the samples of a prompt: every advantage would be "
                "0; raise it, or use algorithm.name = 'reinforce_pp' or 'ppo'"
            )
        if self.rollout.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature = 0: the samples of a prompt would be the same, and the "
                "policy they came from has no log-probabilities; set it above 0"
            )
        return self

    @model_validator(mode="after")
    def _rates_have_room(self) -> "RunConfig":
        self.trainer.check_schedule(self.steps)
        return self

    @model_validator(mode="after")
    def _numbers_agree(self) -> "RunConfig":
        if self.rollout.batch_size % self.trainer.updates_per_batch:
            raise ValueError(
                f"rollout.batch_size = {self.rollout.batch_size} cannot be cut into "
                f"trainer.updates_per_batch = {self.trainer.updates_per_batch} equal mini-batches; "
                "make the first a multiple of the second"
            )
        asks = [e.name for e in self.evals if not e.loss]
        if asks and not self.rollout.generates:
            raise ValueError(
                f"rollout.servers = 0 but evaluation {asks[0]!r} generates; give it a server, or "
                "loss = true to measure the loss of its labels"
            )
        names = [e.name for e in self.evals]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"evals: name {sorted(twice)[0]!r} is used twice; names are folders")
        for field, wanted in (("stop", self.stop), ("regression", self.regression)):
            if wanted and wanted.metric.split("/")[1:2] not in [[n] for n in names]:
                raise ValueError(
                    f"{field}.metric = {wanted.metric!r} belongs to no dataset of evals; "
                    f"write eval/<name of a dataset>/reward (there: {', '.join(names) or 'none'})"
                )
        return self

    @model_validator(mode="after")
    def _checkpoints_can_be_evaluated(self) -> "RunConfig":
        if self.checkpoint.evaluate and not (self.evals and self.checkpoint.hf):
            raise ValueError(
                f"checkpoint.evaluate = true with {len(self.evals)} datasets in evals and "
                f"checkpoint.hf = {str(self.checkpoint.hf).lower()}; give a dataset, and hf = true: "
                "the evaluation starts from the Hugging Face weights"
            )
        if self.regression and not self.checkpoint.evaluate:
            raise ValueError(
                "regression is set but checkpoint.evaluate = false: nothing would compare the "
                "checkpoints; set it to true, or leave regression out"
            )
        return self
