"""Which arguments SGLang and the router are given."""

from pathlib import Path
from typing import Any

import pytest

from rollflow.engines.config import ModelConfig
from rollflow.engines.rollout.server_args import (
    gpus_per_server,
    router_arguments,
    server_arguments,
)


def server(models: tuple[Path, Path], table: dict[str, Any], device: Any = "cpu", **model: Any):
    config = ModelConfig(path=str(models[0]), **model)
    return server_arguments(config, table, device, port=21000, seed=5)


def test_a_cuda_server_is_given_no_cpu_argument(models: tuple[Path, Path]):
    assert server(models, {}, "cuda", dtype="bfloat16") == {
        "model_path": str(models[0]),
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "device": "cuda",
        "host": "127.0.0.1",
        "port": 21000,
        "random_seed": 5,
        "log_level_http": "warning",
        "sampling_backend": "rollflow",
    }


def test_the_users_table_overrides_every_default(models: tuple[Path, Path]):
    assert server(models, {})["mem_fraction_static"] == 0.1
    assert server(models, {"mem_fraction_static": 0.5})["mem_fraction_static"] == 0.5


@pytest.mark.parametrize("name", ["model_path", "host", "port", "device", "dtype"])
def test_what_rollflow_owns_is_refused_by_name(models: tuple[Path, Path], name: str):
    with pytest.raises(ValueError, match=rf"sglang\.{name} "):
        server(models, {name: "x"})


def test_an_unknown_name_is_refused_with_the_nearest_one(models: tuple[Path, Path]):
    with pytest.raises(ValueError, match=r"did you mean sglang\.mem_fraction_static"):
        server(models, {"mem_fraction_statik": 0.5})


def test_random_weights_are_not_looked_for_on_disk(models: tuple[Path, Path]):
    assert server(models, {}, random_weights=True)["load_format"] == "dummy"


def test_the_cpu_cache_holds_no_more_than_its_bytes(tmp_path: Path):
    config = '{"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 36}'
    (tmp_path / "config.json").write_text(config)
    arguments = server((tmp_path, tmp_path), {})
    assert arguments["max_total_tokens"] == 2**30 // (2 * 4 * 36 * 32 * 128)


def test_the_router_is_on_loopback_and_takes_the_users_policy():
    arguments = router_arguments({"policy": "cache_aware"}, port=1, metrics_port=2, timeout_s=9)
    assert arguments["policy"] == "cache_aware"
    assert (arguments["host"], arguments["prometheus_host"]) == ("127.0.0.1", "127.0.0.1")
    assert arguments["request_timeout_secs"] == 9
    with pytest.raises(ValueError, match=r"router\.worker_urls"):
        router_arguments({"worker_urls": []}, port=1, metrics_port=2, timeout_s=9)


def test_a_server_takes_a_gpu_for_each_of_its_ranks():
    assert gpus_per_server({"tp_size": 4, "pp_size": 2}, "cuda") == 8
    assert gpus_per_server({"tp_size": 4}, "cpu") == 0
