"""Settings of the Megatron trainer that are ours; Megatron's own go into the ``[megatron]`` table."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rollflow.engines.config import Setting, check_table, dataclass_settings
from rollflow.storage.config import Config


class TrainerConfig(Config):
    """How a batch is trained on."""

    ranks: int = Field(default=1, gt=0)
    """Trainer processes; data parallel size = ranks / (TP x PP x CP)."""
    max_tokens_per_micro_batch: int = Field(default=4096, gt=0)
    """Packed tokens in one forward and backward; a longer sample gets a micro-batch of its own."""
    updates_per_batch: int = Field(default=1, gt=0)
    """Optimizer updates per batch: its groups are cut into so many mini-batches."""
    old_logprobs: Literal["auto", "always"] = "auto"
    """Where old log-probabilities come from. ``auto``: where a batch has one update and nothing else
    asks for them before it, from the update's own forward pass, of the same weights; the gate on first
    ratios then holds by construction. ``always``: from a forward pass of their own."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer updates over which the learning rate rises linearly from 0."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = (
        "constant"
    )
    """``WSD`` is warm-up, stable, decay: constant until its last ``lr_wsd_decay_steps``."""
    lr_decay_steps: int = Field(default=0, ge=0)
    """Optimizer updates until the learning rate reaches ``min_lr``; 0: with the last step."""
    lr_wsd_decay_steps: int = Field(default=0, ge=0)
    """Optimizer updates of the decay of ``WSD``, the last of ``lr_decay_steps``."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    load: str = ""
    """Weights that the run starts from in place of ``model.path``'s: a torch_dist checkpoint of any
    layout, one in Megatron's ``torch`` format, or a Hugging Face folder; any fsspec URL."""
    ref_load: str = ""
    """Weights of the reference policy, of the same kinds; empty: ``model.path``'s. Where ``load`` is
    empty the run starts from them too."""
    router_replay: bool = False
    """For models with a mixture of experts: the trainer's routers send each token to the experts that
    the servers sent it to, in training and for the old log-probabilities; their choice is stored with
    the samples. Reference, critic and validation route freely."""
    seed: int = 1234
    deterministic: bool = True
    """Training the same batch again gives bit-equal weights, which going on from the log relies on. A
    CPU always does; on a GPU ``false`` takes faster kernels, and a step done again may be refused
    because its weights differ."""
    step_timeout_s: float = Field(default=3600.0, gt=0)
    """Deadline of one call of the engines: to generate, score or write a batch, to evaluate, train a step,
    save or push weights."""
    push_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline of one rollout server to take and confirm a bucket of weights, or all of them where they
    are broadcast to GPUs."""

    @model_validator(mode="after")
    def _only_wsd_decays_at_its_end(self) -> "TrainerConfig":
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_steps > 0):
            raise ValueError(
                f"trainer.lr_wsd_decay_steps = {self.lr_wsd_decay_steps} with trainer.lr_decay_style = "
                f"{self.lr_decay_style!r}; 'WSD' needs 1 or more, any other style 0"
            )
        return self

    def decay_updates(self, steps: int) -> int:
        """Updates until the learning rate reaches ``min_lr``, in a run of so many steps."""
        return self.lr_decay_steps or max(1, steps * self.updates_per_batch)

    def check_schedule(self, steps: int) -> None:
        """The parts of the schedule have room in a run of so many steps.

        Raises:
            ValueError: the warmup, or the decay of WSD, leaves the other parts none.
        """
        decay = self.decay_updates(steps)
        if self.lr_warmup_steps >= decay:
            raise ValueError(
                f"trainer.lr_warmup_steps = {self.lr_warmup_steps} is not below the {decay} updates "
                "over which the learning rate decays (trainer.lr_decay_steps, or steps x "
                "updates_per_batch); lower it"
            )
        if self.lr_wsd_decay_steps > decay - self.lr_warmup_steps:
            raise ValueError(
                f"trainer.lr_wsd_decay_steps = {self.lr_wsd_decay_steps} is more than the "
                f"{decay - self.lr_warmup_steps} updates after the warmup; lower it"
            )


class CheckpointConfig(Config):
    """When checkpoints are written, and which of them stay."""

    every: int = Field(default=0, ge=0)
    """Save each so many steps, and after the last; 0: only after the last."""
    last: bool = True
    """Save after the last step. Without it a run may end with steps that are in the log alone: for one that
    measures speed, whose weights nobody wants."""
    hf: bool = True
    """Also write Hugging Face safetensors beside the torch_dist checkpoint."""
    background: bool = False
    """Training goes on as soon as a checkpoint is on this machine's disk; checksums, the way into the
    store and the commit run beside it. The last checkpoint of a run is waited for."""
    keep_last: int = Field(default=0, ge=0)
    """Newest checkpoints that stay; 0: all of them. An older one is deleted once a newer stands."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints after each so many steps stay for good, whatever ``keep_last`` says; 0: none."""

    evaluate: bool = False
    """Each checkpoint is evaluated on the datasets of ``evals`` by a flow run of its own, with engines of
    its own, while training goes on: an automation that ``rollflow deploy`` creates starts it."""

    def expired(self, steps: Sequence[int]) -> list[int]:
        """Which of the checkpoints after these steps (the last step trained, counted from 0) go."""
        if not self.keep_last:
            return []
        old = sorted(steps)[: -self.keep_last]
        return [s for s in old if not (self.keep_every and (s + 1) % self.keep_every == 0)]

    def due(self, trained: int) -> bool:
        """Whether to save after ``trained`` steps."""
        return self.every > 0 and trained % self.every == 0


class GatesConfig(Config):
    """Numbers that must hold, or the run stops. Defaults depend on the model's dtype."""

    logprob_gap_max: float | None = Field(default=None, gt=0)
    """Largest |trainer - rollout| log-probability of a token before each step's first update
    (default 1e-4 in float32, none in bfloat16)."""
    logprob_gap_mean: float | None = Field(default=None, gt=0)
    """Its mean (default none in float32, 0.02 in bfloat16)."""
    mismatch_kl: float | None = Field(default=None, gt=0)
    """Estimated KL(rollout || trainer) (default none in float32, 0.002 in bfloat16)."""


_ARCHITECTURE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "add_qkv_bias", "add_bias_linear", "qk_layernorm", "normalization"),
    *("gated_linear_unit", "activation_func", "layernorm_epsilon"),
)
_DTYPES = ("params_dtype", "bf16", "fp16", "pipeline_dtype", "autocast_dtype")
MEGATRON_OWNED = {
    **dict.fromkeys(_DTYPES, "use model.dtype"),
    **dict.fromkeys(_ARCHITECTURE, "use model.path (its config.json)"),
    "variable_seq_lengths": "sequences are always packed",
    "calculate_per_token_loss": "use algorithm.reduction",
    "finalize_model_grads_func": "the trainer sets it",
    "grad_scale_func": "the trainer sets it",
    "no_sync_func": "the trainer sets it",
    "average_in_collective": "gradients are always summed",
    "moe_enable_routing_replay": "use trainer.router_replay",
}
"""Megatron's fields that rollflow sets, and why or what to use instead."""

_SOURCES = (
    ("model_parallel_config.py", "ModelParallelConfig"),
    ("transformer/transformer_config.py", "TransformerConfig"),
    ("optimizer/optimizer_config.py", "OptimizerConfig"),
    ("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),
)


def megatron_settings() -> dict[str, Setting]:
    """Every setting that the ``[megatron]`` table takes; empty without megatron-core."""
    found: dict[str, Setting] = {}
    for file, name in _SOURCES:
        found |= dataclass_settings("megatron.core", file, name)
    return found


def check_megatron(given: Mapping[str, Any]) -> None:
    """Refuse names that megatron-core's configuration classes lack or rollflow owns, values of a
    wrong type, and rates below 0."""
    check_table("megatron", given, megatron_settings(), MEGATRON_OWNED)
    for name in ("lr", "min_lr", "weight_decay", "clip_grad"):
        if isinstance(value := given.get(name), int | float) and value < 0:
            raise ValueError(f"megatron.{name} = {value} is below 0; give 0 or more")
