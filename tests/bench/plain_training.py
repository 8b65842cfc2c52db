"""A training step of transformers' Qwen3 in plain PyTorch: what ours has to be as fast as.

Each decoder layer is compiled; the cross entropy is computed in chunks of tokens, so that no whole
matrix of logits is kept. ``python tests/bench/plain_training.py --shape 1.7b`` prints one line of JSON.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollflow.engines.megatron.speed import matrix_flops_per_s
from rollflow.flows.recipes.throughput import SHAPES

SAMPLES, TOKENS, CHUNK, WARM_UP = 256, 576, 2304, 2


@torch.compile(dynamic=False)
def chunk_loss(hidden, weight, targets):
    return cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def loss_of(model, ids):
    """Sum over tokens; a chunk's logits are computed again for their gradient."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    parts = zip(hidden.split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    losses = [
        checkpoint(chunk_loss, h, model.lm_head.weight, y, use_reentrant=False) for h, y in parts
    ]
    return torch.stack(losses).sum()


def flops_per_token(shape):
    """6 for each weight of a matrix, and causal attention counted half."""
    m = SHAPES[shape]
    layers, heads = m["num_hidden_layers"], m["num_attention_heads"] * m["head_dim"]
    groups = m["num_key_value_heads"] * m["head_dim"]
    layer = m["hidden_size"] * (2 * heads + 2 * groups + 3 * m["intermediate_size"])
    weights = layers * layer + m["hidden_size"] * m["vocab_size"]
    return 6 * weights + 3 * layers * 4 * heads * TOKENS / 2


def main():
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--shape", choices=tuple(SHAPES), default="0.6b")
    words.add_argument("--rows", type=int, default=16, help="samples in a micro-batch")
    words.add_argument("--steps", type=int, default=3)
    asked = words.parse_args()
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[asked.shape])
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    seconds = []
    for _ in range(WARM_UP + asked.steps):
        ids = torch.randint(config.vocab_size, (SAMPLES, TOKENS + 1), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        for rows in ids.split(asked.rows):
            (loss_of(model, rows) / (SAMPLES * TOKENS)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[WARM_UP:])
    tokens_per_s = SAMPLES * TOKENS / step_s
    ceiling = matrix_flops_per_s()
    facts = {
        "shape": asked.shape,
        "rows": asked.rows,
        "step_s": step_s,
        "steps_s": seconds,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * flops_per_token(asked.shape) / ceiling,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "card": torch.cuda.get_device_name(),
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
