"""Mistakes that the algorithms could have; ``mutate`` makes them, and a test must fail on each."""

from tests.engines.algorithms.mutant import mutants_of
from tests.engines.algorithms.mutants_of_advantages import ADVANTAGES

MUTANTS = [
    *ADVANTAGES,
    *mutants_of(
        "kl.py",
        (
            "KL: policy and reference swapped",
            "logprobs_T - ref_logprobs_T",
            "ref_logprobs_T - logprobs_T",
        ),
        ("KL: k2 without its half", "log_ratio_T.square() / 2", "log_ratio_T.square()"),
        (
            "KL: k2 is k3",
            "return log_ratio_T.square() / 2",
            "return _k3(log_ratio_T)",
        ),
        (
            "KL: k3 of the other direction",
            "(-limited_T).expm1() + limited_T",
            "limited_T.expm1() - limited_T",
        ),
        (
            "KL: low_var without its limit",
            "_k3(log_ratio_T).clamp(max=_LOW_VAR_LIMIT)",
            "_k3(log_ratio_T)",
        ),
        (
            "KL: k3 overflows",
            "log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)",
            "log_ratio_T",
        ),
    ),
    *mutants_of(
        "losses.py",
        (
            "GSPO: clip fractions by the ratios of tokens",
            "clipped_T.detach(), log_ratio_T.detach()",
            "clipped_T.detach(), token_log_ratio_T.detach()",
        ),
        (
            "Clip: sign flipped",
            "free_T = -ratio_T * advantages_T\n    bound_T = -ratio_T",
            "free_T = ratio_T * advantages_T\n    bound_T = ratio_T",
        ),
        (
            "Clip: old and new policy swapped",
            "token_log_ratio_T = logprobs_T - old_logprobs_T.detach()",
            "token_log_ratio_T = old_logprobs_T.detach() - logprobs_T",
        ),
        (
            "Clip: dropped",
            "bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)",
            "bound_T = -ratio_T",
        ),
        (
            "Clip-higher: the upper bound is the lower one's mirror image",
            "bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)",
            "bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip)",
        ),
        (
            "Clip: the better of both bounds",
            "torch.maximum(free_T, bound_T), bound_T > free_T",
            "torch.minimum(free_T, bound_T), bound_T > free_T",
        ),
        (
            "Clip: a gradient reaches the advantages",
            "    advantages_T = advantages_T.detach()\n",
            "",
        ),
        (
            "Dual clip: dropped",
            "torch.where(above_T, ceiling_T, loss_T)",
            "torch.where(above_T, loss_T, loss_T)",
        ),
        (
            "Dual clip: also where the advantage is positive",
            "(advantages_T < 0) & (loss_T > ceiling_T)",
            "loss_T > ceiling_T",
        ),
        (
            "GSPO: a ratio of each token",
            "log_ratio_T = segment_mean(token_log_ratio_T, segments_T)",
            "log_ratio_T = token_log_ratio_T",
        ),
        (
            "GSPO: the gradient of a token is its own ratio's",
            "log_ratio_T = segment_mean(token_log_ratio_T, segments_T)",
            "log_ratio_T = token_log_ratio_T - token_log_ratio_T.detach()\n"
            "        log_ratio_T += segment_mean(token_log_ratio_T, segments_T).detach()",
        ),
        (
            "CISPO: a gradient through the clipped weight",
            "(logprobs_T - old_logprobs_T).detach()",
            "logprobs_T - old_logprobs_T",
        ),
        (
            "CISPO: clip dropped",
            "weight_T = ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)",
            "weight_T = ratio_T",
        ),
        ("CISPO: sign flipped", "loss_T=-weight_T *", "loss_T=weight_T *"),
        (
            "CISPO: importance weight missing",
            "loss_T=-weight_T * advantages_T",
            "loss_T=-advantages_T",
        ),
        (
            "Critic: value clip dropped",
            "(values_T - old_T).clamp(-value_clip, value_clip)",
            "(values_T - old_T)",
        ),
        (
            "Critic: the better of both losses",
            "torch.maximum(free_T, bound_T) / 2",
            "torch.minimum(free_T, bound_T) / 2",
        ),
        (
            "Critic: half missing",
            "torch.maximum(free_T, bound_T) / 2",
            "torch.maximum(free_T, bound_T)",
        ),
        ("SFT: sign flipped", "return -logprobs_T", "return logprobs_T"),
    ),
    *mutants_of(
        "importance.py",
        (
            "Correction: trainer and rollout swapped",
            "old_logprobs_T.detach() - rollout_logprobs_T.detach()",
            "rollout_logprobs_T.detach() - old_logprobs_T.detach()",
        ),
        (
            "Correction: sequence is geometric",
            "log_weight_T = segment_sum(log_ratio_T, segments_T)",
            "log_weight_T = segment_mean(log_ratio_T, segments_T)",
        ),
        (
            "Correction: geometric is sequence",
            "log_weight_T = segment_mean(log_ratio_T, segments_T)",
            "log_weight_T = segment_sum(log_ratio_T, segments_T)",
        ),
        ("TIS: bound ignored", "factor_T = weight_T.clamp(low, high)", "factor_T = weight_T"),
        (
            "IcePop: masks nothing",
            "factor_T = weight_T.masked_fill(outside_T, 0.0)",
            "factor_T = weight_T",
        ),
        (
            "IcePop: the lower bound ignored",
            "(weight_T < low) | (weight_T > high)",
            "weight_T > high",
        ),
        (
            "Reject: the token only, not its sample",
            "segment_sum(outside_T.to(weight_T.dtype), segments_T) > 0",
            "outside_T",
        ),
        (
            "Reject: what stays is weighed",
            "torch.ones_like(weight_T).masked_fill",
            "weight_T.masked_fill",
        ),
        (
            "Off-policy mask: good tokens left out",
            "(advantages_T < 0) & (distance_T > delta)",
            "(advantages_T > 0) & (distance_T > delta)",
        ),
        (
            "Off-policy mask: policy and rollout swapped",
            "rollout_logprobs_T.detach() - logprobs_T.detach()",
            "logprobs_T.detach() - rollout_logprobs_T.detach()",
        ),
        (
            "Off-policy mask: by the token, not the sample",
            "distance_T = segment_mean(rollout_logprobs_T.detach() - logprobs_T.detach(), segments_T)",
            "distance_T = rollout_logprobs_T.detach() - logprobs_T.detach()",
        ),
    ),
    *mutants_of(
        "policy.py",
        (
            "Correction: importance weight missing",
            "loss_T = loss_T * factor_T",
            "loss_T = loss_T * 1.0",
        ),
        (
            "Off-policy mask: leaves nothing out",
            "loss_T = loss_T.masked_fill(off_T, 0.0)",
            "loss_T = loss_T.clone()",
        ),
        (
            "Entropy: sign flipped",
            "loss_T - config.entropy_coef * entropy_T",
            "loss_T + config.entropy_coef * entropy_T",
        ),
        (
            "KL in the loss: sign flipped",
            "loss_T + config.kl_coef * kl_T",
            "loss_T - config.kl_coef * kl_T",
        ),
        (
            "KL in the loss: not weighed where it is to be unbiased",
            "kl_T = kl_T * (inputs.logprobs_T - old_T).clamp(-20.0, 20.0).exp()",
            "kl_T = kl_T * 1.0",
        ),
        (
            "KL in the reward: policy and reference swapped",
            "kl_estimate(old_T.double(), ref_T.double(), config.kl_type)",
            "kl_estimate(ref_T.double(), old_T.double(), config.kl_type)",
        ),
        (
            "Distillation: teacher and policy swapped",
            "(teacher_T.double() - old_T.double())",
            "(old_T.double() - teacher_T.double())",
        ),
        (
            "Dr.GRPO: divided by the std",
            "episodes_N, normalize_std=False)",
            "episodes_N, normalize_std=True)",
        ),
        (
            "REINFORCE++: gamma dropped",
            "discounted_sum(rewards_T, segments_T, config.gamma)",
            "discounted_sum(rewards_T, segments_T, 1.0)",
        ),
        (
            "GSPO, metrics: mask ignored",
            "trained_T = inputs.weights_T > 0",
            "trained_T = inputs.weights_T >= 0",
        ),
        (
            "Every loss: the mean of its micro-batch",
            "LossOutputs((loss_T * inputs.weights_T).sum(), metrics.merge",
            "LossOutputs(loss_T.mean(), metrics.merge",
        ),
        (
            "Every algorithm: clip fractions swapped",
            '"train/clipfrac_low": mean_of(policy.clipped_T & (policy.bounded_T < 0))',
            '"train/clipfrac_low": mean_of(policy.clipped_T & (policy.bounded_T > 0))',
        ),
    ),
    *mutants_of(
        "reduction.py",
        (
            "Token reduction: by samples",
            "share = sum(trained_tokens_N)",
            "share = len(trained_tokens_N)",
        ),
        (
            "Sequence reduction: length forgotten",
            "1 / (samples * tokens) if tokens",
            "1 / samples if tokens",
        ),
        (
            "Sequence reduction: samples without a trained token counted",
            "samples = sum(tokens > 0 for tokens in trained_tokens_N)",
            "samples = len(trained_tokens_N)",
        ),
        (
            "Episode reduction: every sample its own episode",
            "_episode_weights(trained_tokens_N, episodes_N or range(len(trained_tokens_N)))",
            "_episode_weights(trained_tokens_N, range(len(trained_tokens_N)))",
        ),
        (
            "Episode reduction: siblings do not share its tokens",
            "1 / (episodes * tokens_E[episode]) if",
            "1 / (episodes * tokens) if",
        ),
        (
            "Constant reduction: of the batch, not of the sample",
            "share = samples * constant_tokens",
            "share = constant_tokens",
        ),
        ("Shifted mask", "[mask.float() * weight for", "[mask.float().roll(1) * weight for"),
    ),
    *mutants_of(
        "logprobs.py",
        (
            "Log-probability: the gradient forgets the temperature",
            "(gradient_cV / split.temperature).to",
            "gradient_cV.to",
        ),
        (
            "Log-probability: of the token before",
            "split.owned(targets_c)\n    target_c",
            "split.owned(targets_c.roll(1))\n    target_c",
        ),
        (
            "Log-probability: padding of the vocabulary takes part",
            "scaled_cV[:, self.columns :] = -torch.inf",
            "scaled_cV[:, self.columns :] *= 1.0",
        ),
        (
            "Log-probability: the gradient's normaliser rounded as the logits are large",
            "torch.stack([logprob_c, log_total_c - weighted_c / total_c, highest_c, log_total_c])",
            "torch.stack(\n        [logprob_c, log_total_c - weighted_c / total_c, highest_c + log_total_c, 0 * highest_c]"
            "\n    )",
        ),
        (
            "Entropy: the gradient's sign flipped",
            "log_p_cV.mul_(on_entropy_c[:, None])",
            "log_p_cV.mul_(-on_entropy_c[:, None])",
        ),
    ),
    *mutants_of(
        "mismatch.py",
        (
            "Mismatch: the KL of the other direction",
            'kl_estimate(rollout_T, trainer_T, "k3")',
            'kl_estimate(trainer_T, rollout_T, "k3")',
        ),
    ),
    *mutants_of(
        "diagnostics.py",
        (
            "Diagnostics: dead prompts are the solved ones",
            "sum(best <= 0 for best in flat)",
            "sum(best > 0 for best in flat)",
        ),
    ),
    *mutants_of(
        "config.py",
        (
            "DAPO: no higher upper bound",
            "eps_clip_high: float = Field(default=0.28, gt=0)",
            "eps_clip_high: float = Field(default=0.2, gt=0)",
        ),
    ),
]
