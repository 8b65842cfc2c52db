"""The arguments of one SGLang server and of the router: what we set, under what the user sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollflow.engines.config import ModelConfig
from rollflow.engines.gpu.sampler import BACKEND as SAMPLER
from rollflow.engines.platform import Device

from .config_servers import check_router, check_sglang

CPU_KV_BYTES = 1 << 30
CPU_KV_TOKENS = 1 << 16
SHARED_GPU_FRACTION = 0.5
"""Of a GPU's memory that a server has for weights and cache where a trainer rank shares it."""


def server_arguments(
    model: ModelConfig, table: Mapping[str, Any], device: Device, *, port: int, seed: int
) -> dict[str, Any]:
    """Fields of SGLang's ServerArgs for one server on loopback.

    ``table`` is the user's ``[sglang]`` table, and its group's; it overrides every default, the
    CPU's included. Raises ValueError for a name that SGLang lacks or that rollflow owns.
    """
    check_sglang(table)
    defaults: dict[str, Any] = {"log_level_http": "warning"}
    if model.random_weights:
        defaults["load_format"] = "dummy"
    if device == "cpu":
        defaults |= _cpu_defaults(model)
    else:
        defaults["sampling_backend"] = SAMPLER
    owned = {
        "model_path": model.path,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "device": device,
        "host": "127.0.0.1",
        "port": port,
        "random_seed": seed,
    }
    return {**defaults, **table, **owned}


def deterministic_arguments(device: Device) -> dict[str, Any]:
    """Arguments under which a request's tokens and log-probabilities are bit for bit the same again.

    On a GPU these are SGLang's batch-invariant kernels. A CPU has none: one request at a time, and
    no prefix shared with others, so that nothing depends on what else is in a batch.
    """
    if device == "cuda":
        return {"enable_deterministic_inference": True}
    return {"max_running_requests": 1, "disable_radix_cache": True}


def shared_gpu_arguments() -> dict[str, Any]:
    """Arguments of a server that shares its GPU: it can give its memory back, and takes part of it."""
    return {"enable_memory_saver": True, "mem_fraction_static": SHARED_GPU_FRACTION}


def router_arguments(
    table: Mapping[str, Any],
    *,
    port: int,
    metrics_port: int,
    timeout_s: float,
    keyed: bool = False,
) -> dict[str, Any]:
    """Fields of the router's RouterArgs, on loopback and without workers.

    ``table`` is the user's ``[router]`` table; it overrides every default. ``keyed``: requests of
    one key go to one server. Raises ValueError for a name that the router lacks or that rollflow
    owns.
    """
    check_router(table)
    defaults = {
        # A key that is new goes to the server with the fewest requests.
        **({"policy": "manual", "assignment_mode": "min_load"} if keyed else {}),
        **({} if keyed else {"policy": "round_robin"}),
        "log_level": "warn",
        "request_timeout_secs": max(1, round(timeout_s)),
        "worker_startup_check_interval": 1,
        # The fleet tells which servers are up. The router's own verdicts, made of a busy machine's
        # slow answers, shut out every server at once.
        "disable_circuit_breaker": True,
        "health_check_timeout_secs": 60,
        "prometheus_host": "127.0.0.1",
        "prometheus_port": metrics_port,
    }
    return {**defaults, **table, "host": "127.0.0.1", "port": port, "worker_urls": []}


def gpus_per_server(table: Mapping[str, Any], device: Device) -> int:
    """GPUs that one server takes: tensor times pipeline parallel size; none on a CPU."""
    return int(table.get("tp_size", 1)) * int(table.get("pp_size", 1)) if device == "cuda" else 0


def _cpu_defaults(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "enable_deterministic_inference": True,  # else a request's seed is ignored
        "disable_cuda_graph": True,
        "sleep_on_idle": True,  # an idle scheduler would otherwise keep a core busy
        "skip_server_warmup": True,  # there is nothing to compile or capture
        "mem_fraction_static": 0.1,
        "max_total_tokens": _cpu_kv_tokens(model),
    }


def _cpu_kv_tokens(model: ModelConfig) -> int:
    """How many tokens' keys and values fit into ``CPU_KV_BYTES`` in float32."""
    config = json.loads((Path(model.path) / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    token_bytes = 2 * 4 * config["num_hidden_layers"] * kv_heads * head_dim
    return min(CPU_KV_TOKENS, CPU_KV_BYTES // token_bytes)
