"""The CPU support is narrow: nothing of it is left outside, and it nests."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from rollflow.engines.cpu import light_imports
from rollflow.engines.cpu import megatron as support

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's support")


def test_cuda_means_cpu_only_inside_and_also_when_nested():
    before = (torch.cuda.current_device, torch.cuda.synchronize)
    with support.cuda_means_cpu(), support.cuda_means_cpu():
        tensor = torch.zeros(2, device="cuda", pin_memory=True)
        assert tensor.device.type == "cpu"
        assert tensor.cuda() is tensor
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_it_is_undone_after_an_error():
    with pytest.raises(KeyError), support.cuda_means_cpu():
        raise KeyError
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(RuntimeError, match=r"megatron-core 9\.9.*0\.16\.1"):
        support.install()


def test_a_named_random_state_goes_on_where_it_was_and_leaves_the_default_alone():
    tracker = support.CpuRngTracker()
    tracker.add("a", 1)
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    with tracker.fork("a"):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    saved = tracker.get_states()
    with tracker.fork("a"):
        second = torch.rand(2)
    tracker.set_states(saved)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), second)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="'a'"):
        tracker.add("a", 2)


def last_line(code: str) -> str:
    """Of what a new Python prints that runs it."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]


def test_a_trainer_rank_loads_no_compiler_and_no_model_for_images():
    code = (
        "import sys\n"
        "from rollflow.engines.platform import Platform\n"
        "Platform('cpu', 'gloo').import_megatron()\n"
        "from rollflow.engines.megatron import rank\n"
        "left_out = {'torch._dynamo', 'torch._inductor.compile_fx', 'scipy'}\n"
        "print(sorted(left_out & sys.modules.keys()))"
    )
    assert last_line(code) == "[]"


def test_reading_a_tokenizer_loads_no_compiler_until_a_mask_needs_it():
    code = (
        "import sys; from rollflow.engines.cpu.light_imports import no_compiled_masks\n"
        "with no_compiled_masks():\n"
        "    from transformers import AutoTokenizer, masking_utils\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch\n"
        "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as real\n"
        "print(type(masking_utils.TransformGetItemToIndex()) is real)"
    )
    assert last_line(code) == "True"


def test_what_is_compiled_when_it_is_called_gives_what_compiling_gives(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(light_imports, "_compile", compile_now)

    @light_imports._compile_when_called(dynamic=True)
    def double(x):
        return 2 * x

    assert compiled == []
    assert [double(2), double(3)] == [4, 6]
    assert compiled == [{"dynamic": True}]


def test_imports_are_left_out_of_tested_versions_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(RuntimeError, match=r"megatron-core 9\.9.*0\.16\.1"):
        light_imports.import_megatron()
