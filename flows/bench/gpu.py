"""One GPU that trainer and server share: each of them alone, and whole iterations; pushes from one GPU to another.

A shape is measured in parts, smaller shapes first; each is printed as it ends, and none is begun that
would not end in time.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.config import RunConfig
from rollflow.flows.demo import seeded
from rollflow.flows.recipes import throughput
from rollflow.flows.train import train
from rollflow.storage.objects import Store
from rollflow.storage.steps import read_steps
from rollflow.tasks.measure import (
    generate_alone,
    gpu_count,
    gpu_memory_gib,
    gpu_name,
    hbm_bytes_per_s,
    link_bytes_per_s,
    train_alone,
)

SHAPES = ("0.6b", "1.7b")
SETTLED = 3
"""Steps that are not counted: they compile, and take memory for the first time."""
LIMIT_S = 480
"""Seconds after which no part may end, but for those of the first shape."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 256, 64, 512
RUN_PROMPT_TOKENS = 6
"""Of the recipe's own prompts, at most."""
ROWS, LARGE_GIB = {"0.6b": 32, "1.7b": 16, "4b": 12}, 120
"""Samples in a micro-batch; twice as many on a GPU with so much memory."""
CACHE_SPARE = 4096
"""Tokens of keys and values beside those of the answers. A server's larger cache would only take
longer to give back and take again."""
SERVER_SHARE = {"4b": 0.3}
"""Of the GPU's memory, where the trainer's needs more than half."""
GAP_MEAN = {"1.7b": 0.04, "4b": 0.05}
"""Gate on the mean log-probability gap where bfloat16 alone exceeds the usual 0.02: random weights of
these widths are 0.024 and 0.031 from float32 in any bfloat16 pass (tests/bench/bf16_noise.py)."""
TRAINER_BYTES, SERVER_BYTES, ACTIVATIONS_GIB = 18, 2, 16
"""Of a parameter: bfloat16 weight, float32 gradient, master copy and two moments; the server's weight.
What a step needs beside, which is more than a server's smallest useful cache."""
REPEATS = 3
SPLIT_NEW_TOKENS = 64
"""Of an answer where weights are pushed from one GPU to another: what else a step does is as short."""
SPLIT_PARTS = ("join", "export", "pack", "call", "broadcast", "load", "verify")


@dataclass(frozen=True, slots=True)
class Size:
    """How long the whole iterations are, and how many; which parts are measured, all where it is empty."""

    new_tokens: int = NEW_TOKENS
    steps: int = 8
    parts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in (known := [known for known, *_ in PARTS]):
                raise ValueError(f"--part {name!r}: no such part; there are {'; '.join(known)}")


async def measure(
    console: Console, shapes: Sequence[str] = SHAPES, size: Size = Size()
) -> dict[str, Any]:
    """Measure each shape as far as time allows; nothing where torch sees no GPU."""
    card, memory_gib = gpu_name(), gpu_memory_gib()
    if not card:
        console.print("bench gpu: torch sees no GPU here; skipped")
        return {"skipped": "no GPU"}
    started = time.perf_counter()
    facts: dict[str, Any] = {"card": card, "hbm_bytes_per_s": hbm_bytes_per_s()}
    for shape in shapes:
        needed_gib = needs_gib(shape)
        if needed_gib > memory_gib:
            facts[shape] = {
                "refused": f"needs about {needed_gib:.0f} GiB, the GPU has {memory_gib:.0f}"
            }
            console.print(f"bench gpu: {shape} {facts[shape]['refused']}")
            continue
        found: dict[str, Any] = {}
        for name, seconds, part in PARTS:
            if size.parts and name not in size.parts:
                continue
            gone_s = time.perf_counter() - started
            if gone_s + seconds > LIMIT_S and not (shape == shapes[0] and part in NEEDED):
                console.print(f"bench gpu: {gone_s:.0f} s are gone, no time for {shape}: {name}")
                continue
            try:
                found |= await part(shape, size)
            except RuntimeError as error:  # the other parts are figures still
                found["failed"] = {**found.get("failed", {}), name: str(error)[-500:]}
            console.print_json(json.dumps({"shape": shape, "part": name, **found}), indent=None)
        facts[shape] = {"trl_iteration_s": None, **found, **_bound(shape, facts, found)}
        if "mfu" in found:
            _print(shape, card, facts[shape], console)
    facts["seconds"] = time.perf_counter() - started
    return facts


def _config(shape: str, *words: str, new_tokens: int = NEW_TOKENS) -> RunConfig:
    """The throughput recipe with that shape, and the weights of its folder, if it has any.

    Longer answers are packed fewer to a micro-batch.
    """
    files = throughput.make(Path(".rollflow/throughput") / shape, shape)
    name = f"bench-gpu-{shape}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    row = RUN_PROMPT_TOKENS + new_tokens
    tokens = max(_rows(shape) * (RUN_PROMPT_TOKENS + NEW_TOKENS), row)
    cache = PROMPTS * (PROMPT_TOKENS + new_tokens) + CACHE_SPARE
    micro = (
        *("--rollout.sampling.max_new_tokens", str(new_tokens)),
        *("--trainer.max_tokens_per_micro_batch", str(tokens)),
        *("--sglang.max_total_tokens", str(cache)),
    )
    where = ("--model.path", str(files.model), "--data.path", str(files.train))
    if any(files.model.glob("*.safetensors")):
        where += ("--model.random_weights", "false")
    if share := SERVER_SHARE.get(shape):
        micro += ("--sglang.mem_fraction_static", str(share))
    if gate := GAP_MEAN.get(shape):
        micro += ("--gates.logprob_gap_mean", str(gate))
    return load_config(recipes()["throughput_gpu"], seeded(name, 0, *micro, *where, *words))


def _rows(shape: str) -> int:
    return ROWS[shape] * (2 if gpu_memory_gib() >= LARGE_GIB else 1)


def needs_gib(shape: str) -> float:
    """Memory that trainer and server of a shape need together on their one GPU, in GiB."""
    return (TRAINER_BYTES + SERVER_BYTES) * parameters(shape) / 2**30 + ACTIVATIONS_GIB


def parameters(shape: str) -> int:
    """Weights of a shape's matrices; its embedding is its output layer."""
    model = throughput.SHAPES[shape]
    head, hidden, layers = (model[k] for k in ("head_dim", "hidden_size", "num_hidden_layers"))
    queries, groups = (head * model[f"num_{k}_heads"] for k in ("attention", "key_value"))
    layer = hidden * (2 * queries + 2 * groups + 3 * model["intermediate_size"])
    return layers * layer + hidden * model["vocab_size"]


async def _training(shape: str, _: Size) -> dict[str, Any]:
    alone = _train_alone(shape, deterministic=True)
    return {"mfu": alone["mfu"], "train_tokens_per_s": alone["tokens_per_s"], "train_alone": alone}


async def _not_deterministic(shape: str, _: Size) -> dict[str, Any]:
    alone = _train_alone(shape, deterministic=False)
    return {"mfu_not_deterministic": alone["mfu"], "train_alone_not_deterministic": alone}


def _train_alone(shape: str, *, deterministic: bool) -> dict[str, Any]:
    return train_alone(
        _config(shape).model.path,
        samples=PROMPTS,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        tokens_per_micro_batch=_rows(shape) * (PROMPT_TOKENS + NEW_TOKENS),
        steps=REPEATS,
        deterministic=deterministic,
    )


async def _generation(shape: str, _: Size) -> dict[str, Any]:
    config = _config(shape)
    alone = generate_alone(
        config.model.path,
        sglang=dict(config.sglang),
        vocab_size=throughput.SHAPES[shape]["vocab_size"],
        prompts=PROMPTS,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        repeats=REPEATS,
        log_dir=str(Path(".rollflow/logs/speed").resolve()),
    )
    return {"generate_fraction_of_raw": alone["fraction_of_raw"], "generate_alone": alone}


async def _run(shape: str, size: Size) -> dict[str, Any]:
    config = _config(shape, "--steps", str(size.steps), new_tokens=size.new_tokens)
    summary = await train(config)
    records = read_steps(Store(config.store), summary.run)
    steps = [r.metrics | perf for r, perf in zip(records, summary.perf, strict=True)][SETTLED:]
    parts = ("hold", "export", "pack", "load", "verify", "release")
    return {
        "iteration_s": _median(steps, "perf/step_s"),
        "iterations_s": [m["perf/step_s"] for m in steps],
        "iteration_split_s": summary.iteration_split_s,
        "sync_ms": 1e3 * _median(steps, "perf/sync_s"),
        "sync_pause_ms": 1e3 * _median(steps, "perf/sync_pause_s"),
        "sync_parts_ms": {p: 1e3 * _median(steps, f"perf/sync_{p}_s") for p in parts},
        "orchestration_ms": 1e3 * _median(steps, "perf/orchestration_s"),
        "mismatch_kl": max(m["mismatch/kl"] for m in steps),
        "mismatch_gap_mean": max(m["mismatch/logprob_gap_mean"] for m in steps),
        "generate_tokens_per_s": _median(steps, "perf/tokens_per_s"),
        "sleep_s": _median(steps, "perf/sleep_s"),
        "digest_s": _median(steps, "perf/digest_s"),
        "read_s": _median(steps, "perf/read_s"),
        "train_s": _median(steps, "perf/train_s"),
        "gpu_free_gib": [m["perf/gpu_free_gib"] for m in steps],
        "gpu_kept_gib": [m["perf/gpu_kept_gib"] for m in steps],
        "gpu_peak_gib": max(m["perf/gpu_peak_gib"] for m in steps),
    }


async def _split(shape: str, size: Size) -> dict[str, Any]:
    """Pushes of weights where the trainer has one GPU and the server another."""
    if (gpus := gpu_count()) < 2:
        return {"split": {"skipped": f"needs two GPUs, torch sees {gpus}"}}
    words = ("--steps", str(size.steps), "--cluster.colocate", "false")
    config = _config(shape, *words, new_tokens=SPLIT_NEW_TOKENS)
    steps = (await train(config)).perf[SETTLED:]
    weight_bytes, link = 2 * parameters(shape), link_bytes_per_s()
    broadcast = weight_bytes / _median(steps, "perf/sync_broadcast_s")
    found = {
        "sync_ms": 1e3 * _median(steps, "perf/sync_s"),
        "sync_pause_ms": 1e3 * _median(steps, "perf/sync_pause_s"),
        "sync_parts_ms": {p: 1e3 * _median(steps, f"perf/sync_{p}_s") for p in SPLIT_PARTS},
        "sync_gb_s": weight_bytes / _median(steps, "perf/sync_s") / 1e9,
        "broadcast_gb_s": broadcast / 1e9,
        "link_gb_s": link / 1e9,
        "broadcast_fraction_of_link": broadcast / link,
        "pushes": len(steps),
    }
    return {"split": found}


PARTS = (
    ("training alone", 80, _training),
    ("generation alone", 110, _generation),
    ("whole iterations", 200, _run),
    ("training, not deterministic", 80, _not_deterministic),
    ("split", 180, _split),
)
"""(name, seconds that it takes at most with the starts of its processes, what measures it); the first
start of a server on a machine may compile kernels for two minutes more."""
NEEDED = (_training, _generation, _run)


def _bound(shape: str, facts: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Share of what memory allows: a step reads all weights, and the keys and values so far.

    Half of the answer's length is the mean of what is there; weights and cache are bfloat16.
    """
    if "generate_alone" not in found:
        return {}
    model = throughput.SHAPES[shape]
    groups = model["head_dim"] * model["num_key_value_heads"]
    token_bytes = 2 * 2 * model["num_hidden_layers"] * groups
    cache_bytes = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS / 2) * token_bytes
    bound = PROMPTS * facts["hbm_bytes_per_s"] / (2 * parameters(shape) + cache_bytes)
    return {
        "generate_bound_tokens_per_s": bound,
        "generate_fraction_of_bound": found["generate_alone"]["tokens_per_s"] / bound,
    }


def _median(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(m[name] for m in steps)


def _print(shape: str, card: str, facts: dict[str, Any], console: Console) -> None:
    table = Table("what", "figure", title=f"Qwen3-{shape} with random weights on one {card}")
    rows = {
        "training alone, deterministic, tokens/s": f"{facts['train_tokens_per_s']:,.0f}",
        "its share of a measured matrix product's FLOP/s": f"{facts['mfu']:.1%}",
    }
    if "mfu_not_deterministic" in facts:
        rows["the same, not deterministic"] = f"{facts['mfu_not_deterministic']:.1%}"
    if "generate_alone" in facts:
        alone = facts["generate_alone"]
        rows |= {
            "generation alone through client and router, tokens/s": f"{alone['tokens_per_s']:,.0f}",
            "its share of the server asked as it is": f"{facts['generate_fraction_of_raw']:.1%}",
            "its share of what memory allows": f"{facts['generate_fraction_of_bound']:.1%}",
            "server: sleep, wake, ms": f"{1e3 * alone['sleep_s']:.0f}, {1e3 * alone['wake_s']:.0f}",
            "server: memory given back, GiB": f"{alone['freed_gib']:.1f}",
        }
    if "iteration_s" in facts:
        rows |= {
            "iteration, s": f"{facts['iteration_s']:.2f}",
            "  generation, tokens/s": f"{facts['generate_tokens_per_s']:,.0f}",
            "  weight push, ms": f"{facts['sync_ms']:.0f}",
            "  no generation meanwhile, ms": f"{facts['sync_pause_ms']:.0f}",
            "  orchestration, ms": f"{facts['orchestration_ms']:.0f}",
            "log-probability mismatch, KL": f"{facts['mismatch_kl']:.2e}",
            "free for the trainer, GiB": f"{min(facts['gpu_free_gib']):.1f}",
            "kept by the trainer, GiB": f"{max(facts['gpu_kept_gib']):.2f}",
            **{f"  {p}, ms": f"{s * 1e3:.0f}" for p, s in facts["iteration_split_s"].items()},
            **{f"  push: {p}, ms": f"{ms:.0f}" for p, ms in facts["sync_parts_ms"].items()},
        }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
