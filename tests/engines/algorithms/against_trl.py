"""The same inputs through TRL's own loss functions and ours: one loss, one gradient (`make trl`).

TRL's trainer is made without a model: its loss method is given the log-probabilities that it would
have computed. Intended differences, which the settings below take into account:

- CISPO: TRL's ``epsilon_high`` is the bound itself, ours is 1 + ``eps_clip_high``.
- RLOO: TRL's loss has one ratio for the whole sample, the *product* over its tokens; ours is PPO's
  per token. Only the advantage is compared.
- group advantage: TRL divides by std + 1e-4, ours by std + 1e-6.
- entropy: TRL's bonus is a mean over tokens whatever the loss's reduction; ours is reduced as the loss.
- distillation: TRL's reverse KL is over the whole vocabulary; ours takes the sampled token, so the
  *mean* over the policy's samples is compared.
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore[reportMissingImports]
from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]
from trl.trainer.utils import nanstd  # pyright: ignore[reportMissingImports]

from rollflow.engines.algorithms.advantages import group_advantages, leave_one_out_advantages
from rollflow.engines.algorithms.config import (
    CispoConfig,
    CorrectionConfig,
    DapoConfig,
    DistillConfig,
    DrGrpoConfig,
    GrpoConfig,
    GspoConfig,
    SftConfig,
)
from rollflow.engines.algorithms.inputs import AdvantageInputs, LossInputs
from rollflow.engines.algorithms.policy import compute_advantages, compute_loss
from rollflow.engines.algorithms.reduction import token_weights

B, L = 6, 9
CASES = {
    "grpo": (GrpoConfig(), {"loss_type": "grpo"}),
    "grpo kl": (GrpoConfig(kl_coef=0.3), {"loss_type": "grpo", "beta": 0.3}),
    "grpo unbiased kl": (
        GrpoConfig(kl_coef=0.3, kl_unbiased=True),
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    ),
    "dapo": (DapoConfig(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo dual clip": (
        DapoConfig(dual_clip=1.4),
        {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4},
    ),
    "token mean with entropy": (
        DapoConfig(entropy_coef=0.02),
        {"loss_type": "bnpo", "epsilon_high": 0.28, "entropy_coef": 0.02},
    ),
    "dr_grpo": (DrGrpoConfig(constant_tokens=16), {"loss_type": "dr_grpo"}),
    "gspo": (
        GspoConfig(eps_clip=0.05, eps_clip_high=0.08),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.05,
            "epsilon_high": 0.08,
        },
    ),
    "cispo": (
        CispoConfig(eps_clip_high=0.3),
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "off-policy mask": (
        GrpoConfig(off_policy_delta=0.05),
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    ),
    **{
        f"{level} {mode}": (
            GrpoConfig(correction=CorrectionConfig(level=level, mode=mode, low=0.7, high=1.3)),
            {"loss_type": "grpo", "correction": (level, mode)},
        )
        for level in ("token", "sequence")
        for mode in ("truncate", "mask")
    },
}


def draw(seed):
    """Ragged [B, L] inputs with masked tokens in the middle; float64."""
    generator = torch.Generator().manual_seed(seed)
    new = -2 * torch.rand(B, L, generator=generator).double()
    near = [new + 0.3 * torch.randn(B, L, generator=generator).double() for _ in range(3)]
    lengths = torch.randint(2, L + 1, (B,), generator=generator)
    mask = torch.arange(L) < lengths[:, None]
    mask[:, 1] = torch.rand(B, generator=generator) < 0.5
    advantages = torch.randn(B, generator=generator).double()
    entropy = torch.rand(B, L, generator=generator).double()
    return new, *near, mask, advantages, entropy


def trl_loss(settings, new, old, ref, rollout, mask, advantages, entropy):
    """(loss, gradient) of TRL's own method."""
    own = {
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "entropy_coef": 0.0,
        "delta": None,
        "use_bias_correction_kl": False,
    } | settings
    correction = own.pop("correction", None)
    leaf = new.clone().requires_grad_()
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__ |= own | {
        "args": SimpleNamespace(
            delta=own["delta"], use_bias_correction_kl=own["use_bias_correction_kl"]
        ),
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "use_vllm": correction is not None,
        "vllm_importance_sampling_correction": correction is not None,
        "max_completion_length": 16,
        "_entropy_bonus_enabled": own["entropy_coef"] > 0,
        "use_adaptive_entropy": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (leaf, entropy, None),
    }
    ids = torch.zeros(B, L, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask.double(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "sampling_per_token_logps": rollout,
        "num_items_in_batch": mask.sum(),
    }
    if correction:
        inputs["importance_sampling_ratio"] = trl_weights(correction, old, rollout, mask)
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad * mask


def trl_weights(correction, old, rollout, mask):
    """As TRL's generation step computes them, between its lines 2661 and 2703 (1.16.0)."""
    level, mode = correction
    gap = (old - rollout) * mask
    gap = gap.sum(-1, keepdim=True) if level == "sequence" else gap
    weight = gap.exp()
    if mode == "truncate":
        return weight.clamp(0.7, 1.3)
    return weight.masked_fill((weight < 0.7) | (weight > 1.3), 0.0)


def our_loss(config, new, old, ref, rollout, mask, advantages, entropy):
    """(loss, gradient) of ours, on packed tokens."""
    weights = token_weights(
        list(mask), config.reduction, constant_tokens=getattr(config, "constant_tokens", 0)
    )
    leaf = new.clone().requires_grad_()
    inputs = LossInputs(
        logprobs_T=leaf.flatten(),
        weights_T=torch.cat(weights).double(),
        entropy_T=entropy.flatten(),
        advantages_T=advantages[:, None].expand(B, L).flatten(),
        old_logprobs_T=old.flatten(),
        ref_logprobs_T=ref.flatten(),
        rollout_logprobs_T=rollout.flatten(),
        segments_T=torch.arange(B).repeat_interleave(L),
    )
    loss = compute_loss(config, inputs).loss
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("config", "settings"), CASES.values(), ids=CASES.keys())
def test_the_loss_and_its_gradient_are_those_of_trl(config, settings, seed):
    inputs: Any = draw(seed)
    ours, slope = our_loss(config, *inputs)
    theirs, expected = trl_loss(settings, *inputs)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_group_advantages_differ_from_trls_by_the_epsilon_alone(seed):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(seed)).double()
    ours = group_advantages(rewards, [i // 4 for i in range(12)])
    std = nanstd(rewards.view(3, 4), dim=1).repeat_interleave(4)
    theirs = (rewards - rewards.view(3, 4).mean(1).repeat_interleave(4)) / (std + 1e-4)
    expected = theirs * (std + 1e-4) / (std + 1e-6)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_leave_one_out_advantages_are_those_of_trls_formula(seed):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(seed)).double()
    groups = rewards.view(3, 4)
    theirs = groups - (groups.sum(1, keepdim=True) - groups) / 3
    ours = leave_one_out_advantages(rewards, [i // 4 for i in range(12)])
    torch.testing.assert_close(ours, theirs.flatten(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_distillation_advantage_is_less_trls_reverse_kl(seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, 1, 11, generator=generator).double()
    full = GKDTrainer.generalized_jsd_loss(student, teacher, beta=1.0, reduction="sum")
    policy, other = student[0, 0].log_softmax(-1), teacher[0, 0].log_softmax(-1)
    advantages = compute_advantages(
        DistillConfig(),
        AdvantageInputs(
            torch.zeros(11),
            torch.arange(11),
            old_logprobs_T=policy,
            teacher_logprobs_T=other,
        ),
    ).advantages_T
    assert (policy.exp() * advantages).sum().item() == pytest.approx(-full.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_supervised_loss_is_that_of_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, 13, generator=generator)
    labels = torch.randint(13, (2, 7), generator=generator)
    labels[:, :2] = -100
    theirs = ForCausalLMLoss(logits, labels, vocab_size=13)
    targets = labels[:, 1:]
    kept = targets != -100
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    weights = torch.cat(token_weights(list(kept), "token"))
    ours = compute_loss(SftConfig(), LossInputs(logprobs.flatten(), weights)).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert math.isfinite(ours.item())
