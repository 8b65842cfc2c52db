"""The algorithms once more, as slowly and plainly as they can be written: token by token, in loops.

A batch is a list of samples, a sample a list of tokens, a token a dict of numbers (0-dim float64
tensors, so that the gradient of a reference is its own).
"""

import math
import statistics

import torch


def group_outcomes(rewards, groups, episodes, kind):
    """The advantage of each sample over the episodes of its group."""
    found = []
    for reward, group, episode in zip(rewards, groups, episodes, strict=True):
        mine = [(r, e) for r, g, e in zip(rewards, groups, episodes, strict=True) if g == group]
        by_episode = {
            e: statistics.fmean(r for r, f in mine if f == e) for e in {e for _, e in mine}
        }
        if all(math.isclose(r, by_episode[episode]) for r in by_episode.values()):
            found.append(0.0)
            continue
        others = [r for e, r in by_episode.items() if kind != "leave_one_out" or e != episode]
        if not others or (len(by_episode) == 1 and kind == "leave_one_out"):
            found.append(0.0)
            continue
        spread = statistics.stdev(others) if len(others) > 1 else 0.0
        scale = spread + 1e-6 if kind == "group" else 1.0
        found.append((reward - statistics.fmean(others)) / scale)
    return found


def kl(log_ratio, kind):
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio * log_ratio / 2
    k3 = (-log_ratio).exp() - 1 + log_ratio
    return k3 if kind == "k3" or k3 < 10 else k3 * 0 + 10


def rewards_of_tokens(config, sample, reward):
    rewards = [0.0] * len(sample)
    for t, token in enumerate(sample):
        if config.kl_in == "reward" and config.kl_coef:
            rewards[t] -= config.kl_coef * kl(token["old"] - token["ref"], config.kl_type).item()
    rewards[-1] += reward
    return rewards


def gae(rewards, values, gamma, lam):
    advantages, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(rewards) else 0.0
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


def advantages_of(config, sample, outcome):
    """(advantages, returns) of a sample's trained tokens, from its outcome or reward."""
    returns = None
    if config.advantage == "return":
        found = gae(
            rewards_of_tokens(config, sample, outcome), [0.0] * len(sample), config.gamma, 1.0
        )
    elif config.advantage == "gae":
        values = [token["value"].item() for token in sample]
        rewards = rewards_of_tokens(config, sample, outcome)
        found = gae(rewards, values, config.gamma, config.lam)
        returns = [a + v for a, v in zip(found, values, strict=True)]
    else:
        penalties = rewards_of_tokens(config, sample, 0.0)
        found = [outcome + penalty for penalty in penalties]
    for t, token in enumerate(sample):
        found[t] += config.teacher_coef * (token["teacher"] - token["old"]).item()
    return found, returns


def whitened(samples):
    flat = [a for sample in samples for a in sample]
    mean = statistics.fmean(flat)
    variance = statistics.variance(flat) if len(flat) > 1 else 0.0
    return [[(a - mean) / math.sqrt(variance + 1e-8) for a in sample] for sample in samples]


def total(numbers):
    return torch.stack(numbers).sum()


def mean(numbers):
    return total(numbers) / len(numbers)


def policy_term(config, sample, token):
    """The policy loss of one token."""
    ratio, a = (token["new"] - token["old"]).exp(), token["advantage"]
    low, high = 1 - config.eps_clip, 1 + config.eps_clip_high
    if config.loss == "cispo":
        return -min(max(ratio.item(), low), high) * a * token["new"]
    if config.loss == "sequence_clip":
        ratio = mean([t["new"] - t["old"] for t in sample]).exp()
    bounded = ratio if low < ratio < high else ratio.detach().clamp(low, high)
    loss = max(-ratio * a, -bounded * a, key=lambda x: x.item())
    if config.dual_clip and a < 0 and loss > -config.dual_clip * a:
        loss = -config.dual_clip * a
    return loss


def factor(config, sample, token):
    """What importance weights and masks leave of a token's policy loss."""
    kept = 1.0
    if config.off_policy_delta is not None and token["advantage"] < 0:
        far = mean([t["rollout"] - t["new"].detach() for t in sample])
        kept = 0.0 if far > config.off_policy_delta else 1.0
    if (c := config.correction) is None:
        return kept
    gaps = [t["old"] - t["rollout"] for t in sample]
    level = {
        "token": lambda gap: gap.exp(),
        "sequence": lambda gap: total(gaps).exp(),
        "geometric": lambda gap: mean(gaps).exp(),
    }[c.level]
    w = level(token["old"] - token["rollout"])
    if c.mode == "truncate":
        return kept * w.clamp(c.low, c.high)
    if c.mode == "mask":
        return kept * (w if c.low <= w <= c.high else 0.0)
    return kept * float(all(c.low <= level(gap) <= c.high for gap in gaps))


def token_loss(config, sample, token):
    """Everything that a token adds to the loss, before its weight."""
    if config.name == "sft":
        return -token["new"]
    loss = policy_term(config, sample, token) * factor(config, sample, token)
    loss = loss - config.entropy_coef * token["entropy"]
    if config.kl_in == "loss" and config.kl_coef:
        term = kl(token["new"] - token["ref"], config.kl_type)
        if config.kl_unbiased:
            term = term * (token["new"] - token["old"]).exp()
        loss = loss + config.kl_coef * term
    return loss


def reduced(config, samples, episodes):
    """The loss of a batch of samples, some of which may have no trained token."""
    sums = [sum(token_loss(config, s, t) for t in s) for s in samples]
    lengths = [len(s) for s in samples]
    trained = [i for i, n in enumerate(lengths) if n]
    if not trained:
        return 0.0
    if config.reduction == "token":
        return sum(sums) / sum(lengths)
    if config.reduction == "sequence":
        return sum(sums[i] / lengths[i] for i in trained) / len(trained)
    if config.reduction == "constant":
        return sum(sums) / (len(trained) * config.constant_tokens)
    parts = []
    for episode in {episodes[i] for i in trained}:
        mine = [i for i in trained if episodes[i] == episode]
        parts.append(sum(sums[i] for i in mine) / sum(lengths[i] for i in mine))
    return sum(parts) / len(parts)


def value_term(new, old, target, clip):
    near = old + min(max(new.item() - old, -clip), clip)
    if abs(new.item() - old) < clip:
        near = new
    return max((new - target) ** 2, (near - target) ** 2 + 0 * new, key=lambda x: x.item()) / 2
