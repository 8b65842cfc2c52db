"""Every algorithm's settings, and random ragged batches: packed, and as the scalar references take them."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import strategies as st

from rollflow.engines.algorithms.config import (
    CispoConfig,
    CorrectionConfig,
    DapoConfig,
    DistillConfig,
    DrGrpoConfig,
    GrpoConfig,
    GspoConfig,
    PpoConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RlooConfig,
    SftConfig,
)
from rollflow.engines.algorithms.inputs import LossInputs
from rollflow.engines.algorithms.metrics import Metrics
from rollflow.engines.algorithms.policy import compute_loss
from rollflow.engines.algorithms.reduction import token_weights


def corrected(level, mode, **bounds):
    bounds = {"low": 0.6, "high": 1.5, **bounds}
    return GrpoConfig(correction=CorrectionConfig(level=level, mode=mode, **bounds))


SETTINGS = {
    "grpo": GrpoConfig(),
    "grpo-k2": GrpoConfig(kl_coef=0.3, kl_type="k2", reduction="token"),
    "grpo-k3": GrpoConfig(kl_coef=0.3, kl_type="k3", entropy_coef=0.01),
    "grpo-low-var": GrpoConfig(kl_coef=0.3, kl_type="low_var"),
    "grpo-unbiased-k1": GrpoConfig(kl_coef=0.3, kl_type="k1", kl_unbiased=True),
    "grpo-unbiased-k3": GrpoConfig(kl_coef=0.3, kl_unbiased=True, reduction="episode"),
    "grpo-episode": GrpoConfig(reduction="episode", kl_watch=True),
    "dr_grpo": DrGrpoConfig(constant_tokens=7),
    "dapo": DapoConfig(),
    "dual-clip": DapoConfig(dual_clip=1.3),
    "gspo": GspoConfig(eps_clip=0.05, eps_clip_high=0.1),
    "gspo-token": GspoConfig(eps_clip=0.1, eps_clip_high=0.1, reduction="token", dual_clip=1.2),
    "cispo": CispoConfig(eps_clip=0.2, eps_clip_high=0.3),
    "rloo": RlooConfig(),
    "reinforce_pp": ReinforcePlusPlusConfig(kl_coef=0.1, gamma=0.9),
    "reinforce_pp_baseline": ReinforcePlusPlusBaselineConfig(kl_coef=0.2),
    "baseline-reward": ReinforcePlusPlusBaselineConfig(kl_coef=0.2, kl_in="reward"),
    "ppo": PpoConfig(kl_coef=0.2, gamma=0.97, kl_type="k3"),
    "distill": DistillConfig(),
    "grpo-teacher": GrpoConfig(teacher_coef=0.5),
    **{
        f"{mode}-{level}": corrected(level, mode)
        for mode in ("truncate", "mask", "reject")
        for level in ("token", "sequence", "geometric")
    },
    "off-policy": GrpoConfig(off_policy_delta=0.05),
    "off-policy-truncate": GrpoConfig(off_policy_delta=0.05, correction=CorrectionConfig()),
    "sft": SftConfig(),
    "sft-sequence": SftConfig(reduction="sequence"),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
masks_of_samples = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=7)
COLUMNS = ("new", "old", "ref", "rollout", "teacher", "value", "entropy", "advantage")


class Batch:
    """Random ragged samples: as packed tensors, and as the scalar references take them."""

    def __init__(self, config, masks, seed):
        draw = torch.Generator().manual_seed(seed)
        self.config = config
        self.masks = [torch.tensor(mask) for mask in masks]
        self.episodes = [f"e{int(torch.randint(3, (), generator=draw))}" for _ in masks]
        self.groups = [f"g{int(torch.randint(2, (), generator=draw))}" for _ in masks]
        self.rewards = [float(torch.randint(3, (), generator=draw)) for _ in masks]
        self.columns = []
        for mask in masks:
            new = -2 * torch.rand(len(mask), generator=draw).double()
            near = new + 0.3 * torch.randn(4, len(mask), generator=draw).double()
            rest = torch.randn(3, len(mask), generator=draw).double()
            self.columns.append(
                dict(zip(COLUMNS, (new, *near, rest[0], rest[1].abs(), rest[2]), strict=True))
            )
        constant = getattr(config, "constant_tokens", 0)
        self.weights = [
            w.double() for w in token_weights(self.masks, config.reduction, self.episodes, constant)
        ]

    def loss_inputs(self):
        """One LossInputs per sample; segments are numbered when they are packed."""
        return [
            LossInputs(
                logprobs_T=c["new"],
                weights_T=w,
                entropy_T=c["entropy"],
                advantages_T=c["advantage"],
                old_logprobs_T=c["old"],
                ref_logprobs_T=c["ref"],
                rollout_logprobs_T=c["rollout"],
                segments_T=torch.zeros(len(w), dtype=torch.long),
            )
            for c, w in zip(self.columns, self.weights, strict=True)
        ]

    def samples(self, *, gradient=()):
        """Trained tokens only, as dicts of scalars; ``gradient`` names columns that are leaves."""
        return [
            [
                {
                    name: column[t].clone().requires_grad_(name in gradient)
                    for name, column in columns.items()
                }
                for t in range(len(mask))
                if mask[t]
            ]
            for columns, mask in zip(self.columns, self.masks, strict=True)
        ]

    def spread(self, values):
        """Numbers of trained tokens, put to their places among all; 0 elsewhere."""
        flat = iter(values)
        return [next(flat) if m else 0.0 for mask in self.masks for m in mask.tolist()]


def pack(samples):
    packed = {
        field.name: torch.cat([getattr(sample, field.name) for sample in samples])
        for field in fields(LossInputs)
        if getattr(samples[0], field.name) is not None
    }
    lengths = torch.tensor([len(sample.weights_T) for sample in samples])
    packed["segments_T"] = torch.arange(len(samples)).repeat_interleave(lengths)
    return LossInputs(**packed)


def with_gradient(inputs):
    assert inputs.entropy_T is not None
    return replace(
        inputs,
        logprobs_T=inputs.logprobs_T.clone().requires_grad_(),
        entropy_T=inputs.entropy_T.clone().requires_grad_(),
    )


def run(config, micro_batches):
    """(loss, gradient of the packed log-probabilities, gradient of the entropies, metrics)."""
    total, on_new, on_entropy, metrics = 0.0, [], [], Metrics()
    for micro_batch in micro_batches:
        inputs = with_gradient(pack(micro_batch))
        loss, piece = compute_loss(config, inputs)
        loss.backward()
        for found, tensor in ((on_new, inputs.logprobs_T), (on_entropy, inputs.entropy_T)):
            assert tensor is not None
            found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        total += loss.item()
        metrics = metrics.merge(piece)
    return total, torch.cat(on_new), torch.cat(on_entropy), metrics.values()


def slopes(samples, name):
    return [
        0.0 if token[name].grad is None else token[name].grad.item()
        for sample in samples
        for token in sample
    ]
