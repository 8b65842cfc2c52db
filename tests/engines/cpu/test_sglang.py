"""SGLang's stand-ins on a CPU, each in a process of its own: they change what can be imported."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="installs nothing with CUDA")


def run(code: str) -> str:
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    return done.stdout if done.returncode == 0 else done.stderr


def test_sglang_can_be_imported_after_installing_any_number_of_times():
    code = """
from rollflow.engines.cpu.sglang import install
install()
import sys
finders = list(sys.meta_path)
install()
assert sys.meta_path == finders
import sglang.srt.managers.scheduler
from sgl_kernel import assign_req_to_token_pool_cpu
print("imported")
"""
    assert run(code).strip().endswith("imported")


def test_pytorch_still_knows_that_there_is_no_triton():
    code = """
from rollflow.engines.cpu.sglang import install
install()
from torch.utils._triton import has_triton_package
import torch.utils.flop_counter
print(has_triton_package())
"""
    assert run(code).strip() == "False"


def test_an_operation_without_a_stand_in_fails_when_called_and_says_its_name():
    code = """
from rollflow.engines.cpu.sglang import install
install()
from sgl_kernel import verify_tree_greedy_cpu
verify_tree_greedy_cpu()
"""
    assert "NotImplementedError: sgl_kernel.verify_tree_greedy_cpu" in run(code)


def test_an_unknown_version_of_sglang_is_refused_by_name():
    code = """
import importlib.metadata
importlib.metadata.version = lambda name: "0.6.0"
from rollflow.engines.cpu.sglang import install
install()
"""
    assert "RuntimeError: sglang 0.6.0 on a CPU" in run(code)


def test_each_request_gets_its_new_cache_locations():
    from rollflow.engines.cpu.sglang import _assign_req_to_token_pool

    table = torch.zeros(3, 6, dtype=torch.int32)
    _assign_req_to_token_pool(
        torch.tensor([2, 0]),
        table,
        torch.tensor([1, 0]),
        torch.tensor([3, 1]),
        torch.tensor([7, 8, 9]),
        6,
    )
    assert table.tolist() == [[9, 0, 0, 0, 0, 0], [0] * 6, [0, 7, 8, 0, 0, 0]]
