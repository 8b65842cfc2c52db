"""From settings to mathematics: what an algorithm needs, its advantages and its loss.

A trainer computes, for each batch, ``needs(config)``, ``compute_outcomes`` over all samples and then,
for each piece of it, ``compute_advantages`` on packed tokens; for each mini-batch
``reduction.sample_weights`` over all of its samples; for each micro-batch ``compute_loss`` on packed
tokens. The loss of the mini-batch is the plain sum of its micro-batches' losses over all ranks.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .advantages import group_advantages, leave_one_out_advantages
from .config import CorrectionConfig, CriticConfig, PolicyConfig, SftConfig
from .importance import correction, too_far_off
from .inputs import (
    AdvantageFn,
    AdvantageInputs,
    Advantages,
    LossFn,
    LossInputs,
    LossOutputs,
    Outcomes,
    ValueInputs,
)
from .kl import kl_estimate
from .losses import PolicyLoss, cispo_loss, clipped_policy_loss, nll_loss, value_loss
from .metrics import Metrics, max_of, mean_of, weighted_mean_of
from .returns import generalized_advantages, token_rewards
from .segments import discounted_sum

AnyConfig = PolicyConfig | SftConfig


class Needs(NamedTuple):
    """What an algorithm takes beside the current policy's log-probabilities."""

    rewards: bool
    old_logprobs: bool
    """Of the weights at the start of the batch, before its first update."""
    ref_logprobs: bool
    """Of the reference policy: the run's first weights."""
    values: bool = False
    """Of a critic."""
    teacher_logprobs: bool = False
    old_in_advantages: bool = False
    """The advantages are made of old log-probabilities: these are asked for before any update."""


Inputs = TypeVar("Inputs", LossInputs, ValueInputs)


def needs(config: AnyConfig) -> Needs:
    """What ``compute_advantages`` and ``compute_loss`` will ask for."""
    if isinstance(config, SftConfig):
        return Needs(rewards=False, old_logprobs=False, ref_logprobs=False)
    return Needs(
        rewards=config.advantage != "none",
        old_logprobs=True,
        ref_logprobs=config.kl_coef > 0 or config.kl_watch,
        values=config.critic is not None,
        teacher_logprobs=config.teacher_coef > 0,
        old_in_advantages=config.teacher_coef > 0
        or (config.kl_coef > 0 and config.kl_in == "reward"),
    )


def compute_outcomes(
    config: AnyConfig,
    rewards_N: Sequence[float | None],
    groups_N: Sequence[Hashable],
    episodes_N: Sequence[Hashable] | None = None,
    own: AdvantageFn | None = None,
) -> Tensor:
    """What each sample of a *whole batch* achieved, float32 [N]: its advantage over its group, or
    its reward where the advantage is made of rewards to come.

    A sample without a reward (None: it failed) counts in no group and has 0; it belongs out of the
    loss by a False mask. ``own`` is the function that ``config.advantage`` names, if it names one.
    Raises ValueError where lengths differ or a number is not finite.
    """
    outcomes_N = torch.zeros(len(rewards_N))
    if isinstance(config, SftConfig) or config.advantage == "none":
        return outcomes_N
    rows = [n for n, reward in enumerate(rewards_N) if reward is not None]
    if len(groups_N) != len(rewards_N):
        raise ValueError(
            f"{len(rewards_N)} rewards but {len(groups_N)} group ids; give one each per sample"
        )
    names = range(len(groups_N)) if episodes_N is None else episodes_N
    scored = Outcomes(
        torch.tensor([rewards_N[n] for n in rows], dtype=torch.float64),
        [groups_N[n] for n in rows],
        [names[n] for n in rows],
    )
    outcomes_N[rows] = _outcomes(config, scored, own).float()
    return outcomes_N


def compute_advantages(config: AnyConfig, inputs: AdvantageInputs) -> Advantages:
    """Advantages token by token, float32 [T], *before* whitening over the batch.

    Raises ValueError where a tensor that the algorithm needs is missing.
    """
    if isinstance(config, SftConfig):
        return Advantages(torch.zeros_like(inputs.outcomes_T))
    by, segments_T = f"advantage {config.advantage!r}", inputs.segments_T
    outcomes_T, returns_T = inputs.outcomes_T.double(), None
    penalty_T = _penalty(config, inputs)
    match config.advantage:
        case "return":
            rewards_T = token_rewards(outcomes_T, penalty_T, segments_T)
            advantages_T = discounted_sum(rewards_T, segments_T, config.gamma)
        case "gae":
            values_T = _required(inputs.values_T, "values_T", by).double()
            advantages_T, returns_T = generalized_advantages(
                token_rewards(outcomes_T, penalty_T, segments_T),
                values_T,
                segments_T,
                gamma=config.gamma,
                lam=config.lam,
            )
        case _:
            advantages_T = outcomes_T if penalty_T is None else outcomes_T - penalty_T
    if config.teacher_coef:
        old_T = _required(inputs.old_logprobs_T, "old_logprobs_T", "teacher_coef above 0")
        teacher_T = _required(inputs.teacher_logprobs_T, "teacher_logprobs_T", "teacher_coef")
        advantages_T = advantages_T + config.teacher_coef * (teacher_T.double() - old_T.double())
    return Advantages(
        advantages_T.float(), returns_T.float() if isinstance(returns_T, Tensor) else None
    )


def compute_loss(config: AnyConfig, inputs: LossInputs, own: LossFn | None = None) -> LossOutputs:
    """The loss of one micro-batch by the algorithm that ``config`` names.

    ``own`` is the function that ``config.loss`` names, if it names one. Raises ValueError where a
    tensor that the algorithm needs is missing or misshapen.
    """
    inputs = _trained(inputs)
    if isinstance(config, SftConfig):
        return _outputs(nll_loss(inputs.logprobs_T), inputs, Metrics())
    return _policy(config, inputs, own)


def compute_value_loss(config: CriticConfig, inputs: ValueInputs) -> LossOutputs:
    """The critic's loss of one micro-batch, reduced as the policy's is."""
    inputs = _trained(inputs)
    loss_T, bounded_T = value_loss(
        inputs.values_T, inputs.old_values_T, inputs.returns_T, config.value_clip
    )
    error_T = inputs.returns_T - inputs.old_values_T
    return LossOutputs(
        (loss_T * inputs.weights_T).sum(),
        Metrics(
            means={
                "critic/loss": weighted_mean_of(loss_T, inputs.weights_T),
                "critic/clipfrac": mean_of(bounded_T),
                "critic/value": mean_of(inputs.old_values_T),
                "critic/return": mean_of(inputs.returns_T),
                "critic/error_sq": mean_of(error_T.square()),
                "critic/return_sq": mean_of(inputs.returns_T.square()),
                "critic/error": mean_of(error_T),
            }
        ),
    )


def _outcomes(config: PolicyConfig, scored: Outcomes, own: AdvantageFn | None) -> Tensor:
    rewards_N, groups_N, episodes_N = scored.rewards_N, scored.groups_N, scored.episodes_N
    match config.advantage:
        case "group":
            return group_advantages(rewards_N, groups_N, episodes_N)
        case "group_mean":
            return group_advantages(rewards_N, groups_N, episodes_N, normalize_std=False)
        case "leave_one_out":
            return leave_one_out_advantages(rewards_N, groups_N, episodes_N)
        case "return" | "gae":
            return rewards_N
        case _:
            return _own(own, f"advantage = {config.advantage!r}", scored, rewards_N)


def _penalty(config: PolicyConfig, inputs: AdvantageInputs) -> Tensor | None:
    """What the KL takes from each token's reward."""
    if config.kl_in == "loss" or not config.kl_coef:
        return None
    by = "kl_in = 'reward'"
    old_T = _required(inputs.old_logprobs_T, "old_logprobs_T", by)
    ref_T = _required(inputs.ref_logprobs_T, "ref_logprobs_T", by)
    return config.kl_coef * kl_estimate(old_T.double(), ref_T.double(), config.kl_type)


def _policy(config: PolicyConfig, inputs: LossInputs, own: LossFn | None) -> LossOutputs:
    """<policy loss x correction> - entropy_coef <entropy> + kl_coef <KL to the reference>."""
    policy = _policy_loss(config, inputs, own)
    loss_T, metrics = _corrected(config, policy.loss_T, inputs)
    metrics = metrics.merge(_watch(policy, loss_T, inputs))
    if config.entropy_coef > 0:
        entropy_T = _required(inputs.entropy_T, "entropy_T", "entropy_coef above 0")
        loss_T = loss_T - config.entropy_coef * entropy_T
    if needs(config).ref_logprobs:
        ref_T = _required(inputs.ref_logprobs_T, "ref_logprobs_T", "the KL to it").detach()
        kl_T = kl_estimate(inputs.logprobs_T, ref_T, config.kl_type)
        metrics = metrics.merge(Metrics({"train/kl": mean_of(kl_T)}))
        if config.kl_in == "loss" and config.kl_coef:
            if config.kl_unbiased:
                old_T = _required(inputs.old_logprobs_T, "old_logprobs_T", "kl_unbiased")
                kl_T = kl_T * (inputs.logprobs_T - old_T).clamp(-20.0, 20.0).exp()
            loss_T = loss_T + config.kl_coef * kl_T
    return _outputs(loss_T, inputs, metrics)


def _policy_loss(config: PolicyConfig, inputs: LossInputs, own: LossFn | None) -> PolicyLoss:
    by = f"loss {config.loss!r}"
    new_T = inputs.logprobs_T
    old_T = _required(inputs.old_logprobs_T, "old_logprobs_T", by)
    advantages_T = _required(inputs.advantages_T, "advantages_T", by)
    if config.loss == "cispo":
        return cispo_loss(
            new_T,
            old_T,
            advantages_T,
            eps_clip=config.eps_clip,
            eps_clip_high=config.eps_clip_high,
        )
    if config.loss in ("clip", "sequence_clip"):
        whole = config.loss == "sequence_clip"
        return clipped_policy_loss(
            new_T,
            old_T,
            advantages_T,
            eps_clip=config.eps_clip,
            eps_clip_high=config.eps_clip_high,
            dual_clip=config.dual_clip,
            segments_T=_required(inputs.segments_T, "segments_T", by) if whole else None,
        )
    loss_T = _own(own, f"loss = {config.loss!r}", inputs, new_T)
    if new_T.requires_grad and not loss_T.requires_grad:
        raise ValueError(
            f"loss = {config.loss!r} gave a tensor without a gradient; compute it from "
            "inputs.logprobs_T, without detach() or no_grad()"
        )
    log_ratio_T = (new_T - old_T).detach()
    return PolicyLoss(loss_T, log_ratio_T, torch.zeros_like(new_T).bool(), log_ratio_T)


def _corrected(config: PolicyConfig, loss_T: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """The loss with importance weights, and without the tokens that are to be left out."""
    metrics = Metrics()
    if config.correction is not None:
        factor_T, metrics = _correction(config.correction, inputs)
        loss_T = loss_T * factor_T
    if config.off_policy_delta is not None:
        by = "off_policy_delta"
        off_T = too_far_off(
            inputs.logprobs_T,
            _required(inputs.rollout_logprobs_T, "rollout_logprobs_T", by),
            _required(inputs.advantages_T, "advantages_T", by),
            _required(inputs.segments_T, "segments_T", by),
            config.off_policy_delta,
        )
        loss_T = loss_T.masked_fill(off_T, 0.0)
        metrics = metrics.merge(Metrics({"correction/off_policy": mean_of(off_T)}))
    return loss_T, metrics


def _correction(config: CorrectionConfig, inputs: LossInputs) -> tuple[Tensor, Metrics]:
    found = correction(
        _required(inputs.old_logprobs_T, "old_logprobs_T", "correction"),
        _required(inputs.rollout_logprobs_T, "rollout_logprobs_T", "correction"),
        _required(inputs.segments_T, "segments_T", "correction"),
        level=config.level,
        mode=config.mode,
        low=config.low,
        high=config.high,
    )
    means = {
        "correction/weight": mean_of(found.weight_T),
        "correction/outside": mean_of(found.outside_T),
        "correction/left_out": mean_of(found.factor_T == 0),
    }
    return found.factor_T, Metrics(means, {"correction/weight_max": max_of(found.weight_T)})


def _watch(policy: PolicyLoss, loss_T: Tensor, inputs: LossInputs) -> Metrics:
    """How far the policy is from the old one, and where bounds hold it."""
    log_ratio_T = policy.log_ratio_T
    ratio_T = log_ratio_T.clamp(-20.0, 20.0).exp()
    means = {
        "train/pg_loss": weighted_mean_of(loss_T, inputs.weights_T),
        "train/pg_clipfrac": mean_of(policy.clipped_T),
        "train/clipfrac_low": mean_of(policy.clipped_T & (policy.bounded_T < 0)),
        "train/clipfrac_high": mean_of(policy.clipped_T & (policy.bounded_T > 0)),
        "train/ppo_kl": mean_of(-log_ratio_T),
        "train/ratio": mean_of(ratio_T),
        "train/ratio_sq": mean_of(ratio_T.double().square()),
    }
    maxima = {
        "train/ratio_max": max_of(log_ratio_T.exp()),
        "train/inverse_ratio_max": max_of((-log_ratio_T).exp()),
        "train/log_ratio_max": max_of(log_ratio_T.abs()),
    }
    if inputs.rollout_logprobs_T is not None:
        rollout_T = inputs.rollout_logprobs_T.detach()
        kl_T = kl_estimate(rollout_T, inputs.logprobs_T.detach(), "k3")
        means["train/kl_rollout"] = mean_of(kl_T)
    return Metrics(means, maxima)


def _outputs(loss_T: Tensor, inputs: LossInputs, metrics: Metrics) -> LossOutputs:
    means = {"train/loss": weighted_mean_of(loss_T, inputs.weights_T)}
    if inputs.entropy_T is not None:
        means["train/entropy"] = mean_of(inputs.entropy_T)
    return LossOutputs((loss_T * inputs.weights_T).sum(), metrics.merge(Metrics(means)))


def _trained(inputs: Inputs) -> Inputs:
    """Only the tokens that are trained on: nothing else can reach a number, NaN included."""
    trained_T = inputs.weights_T > 0
    picked: dict[str, Any] = {}
    for field in fields(inputs):
        tensor: Tensor | None = getattr(inputs, field.name)
        if tensor is not None and tensor.shape != trained_T.shape:
            raise ValueError(
                f"{field.name} has shape {tuple(tensor.shape)}, weights_T "
                f"{tuple(trained_T.shape)}; give one entry per packed token"
            )
        picked[field.name] = None if tensor is None else tensor[trained_T]
    return type(inputs)(**picked)


def _own(function: Callable[[Any], Tensor] | None, field: str, given: Any, like: Tensor) -> Tensor:
    """What a function of the user's gives, if it has the right shape."""
    if function is None:
        raise ValueError(f"{field} names a function of your own, but none was given")
    found = cast(object, function(given))  # whatever a user's function gives
    if not isinstance(found, Tensor):
        raise TypeError(f"{field} gave {type(found).__name__}; give a tensor")
    if found.shape != like.shape:
        raise ValueError(
            f"{field} gave a tensor of shape {tuple(found.shape)}; give one of {tuple(like.shape)}"
        )
    if wrong := int((~torch.isfinite(found)).sum()):
        raise ValueError(
            f"{field} gave {wrong} of {found.numel()} numbers that are not finite; find where it "
            "divides by 0 or takes a logarithm of it"
        )
    return found


def _required(tensor: Tensor | None, name: str, by: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is missing; {by} needs it")
    return tensor
