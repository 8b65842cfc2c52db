"""When a trainer gives the memory of a GPU that it shares back; the GPU's numbers are made up."""

import pytest
import torch

from rollflow.engines.megatron.memory import GIB, SPARE_BYTES, Turns


class Gpu:
    """140 GiB of which a server has some, and this process what it keeps, partly in tensors."""

    def __init__(self, monkeypatch):
        self.server, self.kept, self.used, self.emptied = 20, 10, 10, 0
        for name, answer in {
            "is_available": lambda: True,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 60 * GIB,
            "mem_get_info": lambda: ((140 - self.server - self.kept) * GIB, 140 * GIB),
            "memory_reserved": lambda: self.kept * GIB,
            "memory_allocated": lambda: self.used * GIB,
            "empty_cache": self.empty,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def empty(self):
        self.kept, self.emptied = self.used, self.emptied + 1

    def step(self, turns, kept):
        """Sleep, a step that leaves so much unused, wake, push; what the step took."""
        self.server = 0
        with turns.step() as taken:
            self.kept = kept
        self.server = self.asked
        turns.pushed()
        return taken

    asked = 20


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_what_the_server_does_not_need_is_kept_for_the_next_step(gpu):
    turns = Turns(shares_gpu=True)
    turns.pushed()
    assert gpu.emptied == 1  # nothing is known yet
    for _ in range(3):
        taken = gpu.step(turns, kept=60)
        assert taken["perf/gpu_free_gib"] == 130
        assert taken["perf/gpu_kept_gib"] == 10
        assert taken["perf/gpu_peak_gib"] == 60
    assert gpu.emptied == 1
    assert gpu.kept == 60


def test_what_the_server_needs_is_given_back_before_it_wakes(gpu):
    turns = Turns(shares_gpu=True)
    turns.pushed()
    spare = SPARE_BYTES // GIB
    gpu.step(turns, kept=140 - 20 - spare)
    assert gpu.emptied == 1
    gpu.server = 0
    with turns.step():
        gpu.kept = 140 - 20 - spare + 1
    assert (gpu.emptied, gpu.kept) == (2, 10)


def test_before_the_server_was_seen_awake_all_is_given_back(gpu):
    gpu.step(Turns(shares_gpu=True), kept=60)
    assert gpu.emptied >= 1


def test_a_gpu_of_its_own_is_never_given_back(gpu):
    turns = Turns(shares_gpu=False)
    assert gpu.step(turns, kept=130)["perf/gpu_free_gib"] == 130
    assert gpu.emptied == 0


def test_on_a_cpu_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    turns = Turns(shares_gpu=True)
    with turns.step() as taken:
        pass
    turns.pushed()
    assert taken == {}
