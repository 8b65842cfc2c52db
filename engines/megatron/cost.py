"""What a row of tokens costs to train on, so that data parallel ranks get equal shares of work."""

from typing import Any


def row_flops(config: Any, vocab_size: int, tokens: int) -> float:
    """Multiplications and additions of one forward over a sequence of ``tokens``.

    The backward is a constant multiple of it. ``config`` is megatron-core's TransformerConfig. Matrix
    products grow with the length, causal attention with its square: two rows of half the length cost
    less than one.
    """
    hidden, head = config.hidden_size, config.kv_channels
    queries, groups = config.num_attention_heads * head, config.num_query_groups * head
    if config.num_moe_experts:
        feed_forward = 3 * hidden * config.moe_ffn_hidden_size * config.moe_router_topk
    else:
        feed_forward = 3 * hidden * config.ffn_hidden_size
    weights = hidden * (2 * queries + 2 * groups) + feed_forward
    attention = 2 * queries * (tokens + 1) / 2
    return 2.0 * tokens * (config.num_layers * (weights + attention) + hidden * vocab_size)
