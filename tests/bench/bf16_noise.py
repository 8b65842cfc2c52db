"""How far two bfloat16 forward passes of one model are apart, in the log-probability of a token.

Qwen3's layers in plain PyTorch, with the random weights that Megatron begins with: in float32, in
bfloat16, and in bfloat16 with the rounding between SiLU and its product left out, as fused kernels
do. Trainer and server cannot be nearer than the last two are.
``python tests/bench/bf16_noise.py --shape 1.7b`` prints one line of JSON, on a GPU or a CPU.
"""

import argparse
import json
import math

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from rollflow.flows.recipes.throughput import SHAPES

STD, EPS, CHUNK = 0.02, 1e-6, 64


class Forward:
    """A model's matrices in float32, and passes through them in any precision."""

    def __init__(self, shape, device, generator):
        m = SHAPES[shape]
        self.queries, self.groups = m["num_attention_heads"], m["num_key_value_heads"]
        self.size, self.theta, self.device = m["head_dim"], m["rope_theta"], device
        hidden, inner = m["hidden_size"], m["intermediate_size"]
        heads = self.queries + 2 * self.groups
        out = STD / math.sqrt(2 * m["num_hidden_layers"])

        def matrix(rows, columns, std=STD):
            return std * torch.randn(rows, columns, device=device, generator=generator)

        self.embedding = matrix(m["vocab_size"], hidden)
        self.layers = [
            (
                matrix(heads * self.size, hidden),
                matrix(hidden, self.queries * self.size, out),
                matrix(2 * inner, hidden),
                matrix(hidden, inner, out),
            )
            for _ in range(m["num_hidden_layers"])
        ]

    def logprobs(self, ids, dtype, *, fused=False):
        """Log-probability of ``ids[:, 1:]`` (sequences, tokens), float32."""
        return torch.cat([self._chunk(part, dtype, fused) for part in ids.split(CHUNK)])

    def _chunk(self, ids, dtype, fused):
        length = ids.shape[1] - 1
        x = self.embedding[ids[:, :-1]].to(dtype)
        turn = self._turn(length)
        for weights in self.layers:
            qkv, out, gate_up, down = (w.to(dtype) for w in weights)
            x = x + linear(self._attention(linear(_norm(x), qkv), turn), out)
            gate, up = linear(_norm(x), gate_up).chunk(2, -1)
            inner = (silu(gate.float()) * up.float()).to(dtype) if fused else silu(gate) * up
            x = x + linear(inner, down)
        x, head = _norm(x), self.embedding.to(dtype)
        steps = [
            torch.log_softmax(linear(x[:, t], head).float(), -1).gather(-1, ids[:, t + 1, None])
            for t in range(length)  # a step at a time: all logits at once are many gigabytes
        ]
        return torch.cat(steps, 1)

    def _attention(self, qkv, turn):
        heads = qkv.unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split([self.queries, self.groups, self.groups], 1)
        q, k = (_rotate(_norm(h), *turn) for h in (q, k))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)

    def _turn(self, length):
        steps = torch.arange(0, self.size, 2, device=self.device) / self.size
        angles = torch.outer(torch.arange(length, device=self.device), self.theta**-steps)
        return angles.cos(), angles.sin()


def _norm(x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def main():
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--shape", choices=tuple(SHAPES), default="0.6b")
    words.add_argument("--sequences", type=int, default=256)
    words.add_argument("--tokens", type=int, default=96)
    asked = words.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    model = Forward(asked.shape, device, generator)
    size = (asked.sequences, asked.tokens + 1)
    ids = torch.randint(SHAPES[asked.shape]["vocab_size"], size, device=device, generator=generator)
    with torch.no_grad():
        exact = model.logprobs(ids, torch.float32)
        plain = model.logprobs(ids, torch.bfloat16)
        fused = model.logprobs(ids, torch.bfloat16, fused=True)
    found = {
        "shape": asked.shape,
        "tokens": exact.numel(),
        "bfloat16_from_float32": float((plain - exact).abs().mean()),
        "bfloat16_from_bfloat16": float((plain - fused).abs().mean()),
        "logprob_std": float(exact.std()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
