"""Mistakes that advantages and returns could have."""

from tests.engines.algorithms.mutant import mutants_of

ADVANTAGES = [
    *mutants_of(
        "advantages.py",
        (
            "GRPO: sign flipped",
            "rewards_N.double() - mean_G[groups.group_N]",
            "mean_G[groups.group_N] - rewards_N.double()",
        ),
        (
            "GRPO: mean of the neighbour's group",
            "- mean_G[groups.group_N]",
            "- mean_G[groups.group_N.roll(1)]",
        ),
        (
            "GRPO: std of the neighbour's group",
            "_STD_EPSILON)[groups.group_N]",
            "_STD_EPSILON)[groups.group_N.roll(1)]",
        ),
        (
            "GRPO: biased std",
            "groups.sum(centred_E.square()) / (groups.size_G - 1).clamp(min=1)",
            "groups.sum(centred_E.square()) / groups.size_G",
        ),
        (
            "GRPO: divided by the variance",
            "(variance_G.sqrt() + _STD_EPSILON)",
            "(variance_G + _STD_EPSILON)",
        ),
        (
            "GRPO: rounding left in a group of equal rewards",
            "[groups.group_N]\n    return advantages_N.masked_fill(groups.all_equal_N, 0.0)",
            "[groups.group_N]\n    return advantages_N",
        ),
        (
            "Siblings of an episode counted one by one",
            "named = range(len(groups_N)) if episodes_N is None else episodes_N",
            "named = range(len(groups_N))",
        ),
        (
            "Episodes of one name taken for one in different groups",
            "_numbered(list(zip(groups_N, named, strict=True)), device)",
            "_numbered(list(named), device)",
        ),
        (
            "An episode's reward is its siblings' sum",
            "index_add(0, episode_N, rewards) / siblings_E",
            "index_add(0, episode_N, rewards)",
        ),
        (
            "RLOO: the baseline is the whole group's mean",
            "[groups.group_E] - groups.rewards_E\n"
            "    others_E = others_E / (groups.size_G - 1).clamp(min=1)[groups.group_E]",
            "[groups.group_E]\n    others_E = others_E / groups.size_G[groups.group_E]",
        ),
        (
            "RLOO: sign flipped",
            "rewards_N.double() - others_E[groups.episode_N]",
            "others_E[groups.episode_N] - rewards_N.double()",
        ),
        (
            "RLOO: a lone episode keeps its whole reward",
            "others_E[groups.episode_N]\n    return advantages_N.masked_fill(groups.all_equal_N, 0.0)",
            "others_E[groups.episode_N]\n    return advantages_N",
        ),
        (
            "Equal rewards: looked for among samples in place of episodes",
            'scatter_reduce(0, group_E, rewards_E, "amax"',
            'scatter_reduce(0, group_N, rewards, "amax"',
        ),
    ),
    *mutants_of(
        "returns.py",
        (
            "REINFORCE++, PPO: the reward at every token",
            "rewards_T = rewards_T.masked_fill(~last_T, 0.0)",
            "rewards_T = rewards_T.clone()",
        ),
        (
            "REINFORCE++, PPO: the KL is a reward",
            "rewards_T - penalties_T",
            "rewards_T + penalties_T",
        ),
        ("GAE: lambda dropped", "segments_T, gamma * lam)", "segments_T, gamma)"),
        ("GAE: gamma dropped", "gamma * following(", "following("),
        (
            "GAE: value not subtracted",
            "following(values_T, segments_T) - values_T",
            "following(values_T, segments_T)",
        ),
        (
            "GAE: the return is the advantage",
            "return advantages_T, advantages_T + values_T",
            "return advantages_T, advantages_T",
        ),
        ("Whitening: biased variance", "(second[1] - 1).clamp", "second[1].clamp"),
        ("Whitening: mean left in", "((a.double() - mean) / scale)", "(a.double() / scale)"),
        (
            "Whitening: of each rank by itself",
            'all_reduce(sums, "sum")',
            'all_reduce(sums.clone(), "sum")',
        ),
        ("Whitening: mask ignored", "[a.double()[k] for a, k", "[a.double() for a, _"),
    ),
    *mutants_of(
        "segments.py",
        (
            "Last token shifted to the first",
            "last_T[:-1] = segments_T[1:] != segments_T[:-1]",
            "last_T[1:] = segments_T[1:] != segments_T[:-1]",
        ),
        (
            "GAE: bootstrapped from the next sample",
            "next_T.masked_fill(is_last(segments_T), 0.0)",
            "next_T",
        ),
        (
            "Returns run on into the next sample",
            "later = sums_T[span:] * same",
            "later = sums_T[span:]",
        ),
        ("Returns: discount not compounded", "2 * span, factor * factor", "2 * span, factor"),
        (
            "GSPO: the ratio is the product, not its root",
            "segment_sum(values_T, segments_T) / tokens_T",
            "segment_sum(values_T, segments_T)",
        ),
    ),
]
