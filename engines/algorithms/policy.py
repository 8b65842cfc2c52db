"""From settings to mathematics: what an algorithm needs, its advantages and its loss.

A trainer computes, for each batch, ``needs(config)`` and ``advantages``; for each mini-batch
``reduction.token_weights`` over all of its samples; for each micro-batch ``compute_loss`` on packed
tokens. The loss of the mini-batch is the plain sum of its micro-batches' losses over all ranks.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .advantages import group_advantages
from .config import AlgorithmConfig, GrpoConfig, SftConfig
from .kl import kl_estimate
from .losses import clipped_policy_loss, nll_loss
from .metrics import Metrics, max_of, mean_of, weighted_mean_of


class Needs(NamedTuple):
    """What an algorithm takes beside the current policy's log-probabilities."""

    rewards: bool
    old_logprobs: bool
    """Of the weights at the start of the batch, before its first update."""
    ref_logprobs: bool
    """Of the reference policy: the run's first weights."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The packed tokens of one micro-batch; every tensor is float [T].

    Tokens with weight 0 (prompts, tool output, padding) are looked at by nothing.
    """

    logprobs_T: Tensor
    """Of the policy in training, with gradient."""
    weights_T: Tensor
    """From ``reduction.token_weights`` over the whole mini-batch."""
    entropy_T: Tensor | None = None
    """Of the policy in training; with gradient where ``entropy_coef`` is not 0."""
    advantages_T: Tensor | None = None
    """Each sample's advantage at each of its tokens."""
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None


class LossOutputs(NamedTuple):
    """``loss`` is this micro-batch's share, to be summed; ``metrics`` are to be merged."""

    loss: Tensor
    metrics: Metrics


def needs(config: AlgorithmConfig) -> Needs:
    """What ``compute_loss`` will ask for."""
    match config:
        case GrpoConfig():
            return Needs(rewards=True, old_logprobs=True, ref_logprobs=config.kl_coef > 0)
        case SftConfig():
            return Needs(rewards=False, old_logprobs=False, ref_logprobs=False)


def compute_advantages(
    config: AlgorithmConfig, rewards_N: Sequence[float | None], groups_N: Sequence[Hashable]
) -> Tensor:
    """Advantage of each sample of a *whole batch*, float32 [N].

    A sample without a reward (None: it failed) counts in no group and has advantage 0; it belongs
    out of the loss by a False mask. Raises ValueError where lengths differ or a reward is not
    finite.
    """
    match config:
        case GrpoConfig():
            pairs = zip(rewards_N, groups_N, strict=True)
            scored = [
                (row, reward, group)
                for row, (reward, group) in enumerate(pairs)
                if reward is not None
            ]
            advantages_N = torch.zeros(len(rewards_N), dtype=torch.float64)
            advantages_N[[row for row, _, _ in scored]] = group_advantages(
                torch.tensor([reward for _, reward, _ in scored], dtype=torch.float64),
                [group for _, _, group in scored],
                normalize_std=config.normalize_std,
            )
            return advantages_N.float()
        case SftConfig():
            return torch.zeros(len(rewards_N))


def compute_loss(config: AlgorithmConfig, inputs: LossInputs) -> LossOutputs:
    """The loss of one micro-batch by the algorithm that ``config`` names.

    Raises ValueError where a tensor that the algorithm needs is missing or misshapen.
    """
    inputs = _trained(inputs)
    match config:
        case GrpoConfig():
            return _grpo(config, inputs)
        case SftConfig():
            return _sft(inputs)


def _grpo(config: GrpoConfig, inputs: LossInputs) -> LossOutputs:
    """<clipped policy loss> - entropy_coef <entropy> + kl_coef <KL to the reference>."""
    weights_T = inputs.weights_T
    policy = clipped_policy_loss(
        inputs.logprobs_T,
        _required(inputs.old_logprobs_T, "old_logprobs_T", "grpo"),
        _required(inputs.advantages_T, "advantages_T", "grpo"),
        eps_clip=config.eps_clip,
        eps_clip_high=config.eps_clip_high,
    )
    loss_T = policy.loss_T
    means = {
        "train/pg_loss": weighted_mean_of(policy.loss_T, weights_T),
        "train/pg_clipfrac": mean_of(policy.clipped_T),
        "train/ppo_kl": mean_of(-policy.log_ratio_T),
    }
    if config.entropy_coef > 0:
        entropy_T = _required(inputs.entropy_T, "entropy_T", "entropy_coef above 0")
        loss_T = loss_T - config.entropy_coef * entropy_T
    if config.kl_coef > 0:
        ref_T = _required(inputs.ref_logprobs_T, "ref_logprobs_T", "kl_coef above 0").detach()
        kl_T = kl_estimate(inputs.logprobs_T, ref_T, config.kl_type)
        loss_T = loss_T + config.kl_coef * kl_T
        means["train/kl"] = mean_of(kl_T)
    maxima = {
        "train/ratio_max": max_of(policy.log_ratio_T.exp()),
        "train/log_ratio_max": max_of(policy.log_ratio_T.abs()),
    }
    return _outputs(loss_T, inputs, Metrics(means, maxima))


def _sft(inputs: LossInputs) -> LossOutputs:
    return _outputs(nll_loss(inputs.logprobs_T), inputs, Metrics())


def _outputs(loss_T: Tensor, inputs: LossInputs, metrics: Metrics) -> LossOutputs:
    means = {"train/loss": weighted_mean_of(loss_T, inputs.weights_T)}
    if inputs.entropy_T is not None:
        means["train/entropy"] = mean_of(inputs.entropy_T)
    return LossOutputs((loss_T * inputs.weights_T).sum(), metrics.merge(Metrics(means)))


def _trained(inputs: LossInputs) -> LossInputs:
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
    return LossInputs(**picked)


def _required(tensor: Tensor | None, name: str, by: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is missing; {by} needs it")
    return tensor
