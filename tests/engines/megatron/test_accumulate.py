"""Gradients that a kernel of ours adds up: the same sums, and nothing left for megatron-core to add."""

from types import SimpleNamespace

import pytest
import torch

from rollflow.engines.megatron.accumulate import SMALL, add_gradients

LARGE = (256, SMALL // 256)


def chunk(shape=LARGE, *, dtype=torch.bfloat16, total=torch.float32, overlap=False, fused=False):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    vars(weight)["main_grad"] = torch.zeros(shape, dtype=total)
    return SimpleNamespace(
        ddp_config=SimpleNamespace(overlap_grad_reduce=overlap),
        config=SimpleNamespace(gradient_accumulation_fusion=fused),
        parameters=lambda: [weight],
        weight=weight,
    )


def test_gradients_of_all_micro_batches_are_in_the_sum_and_megatron_finds_none():
    one, added = chunk(), []

    def add(total, part):
        assert part.dtype is torch.bfloat16
        assert part.is_contiguous()
        added.append(total.data_ptr())
        total.add_(part)

    assert add_gradients([one], add) == 1
    weight, found = one.weight, []
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: found.append(weight.grad))  # where megatron-core adds
    expected = torch.zeros(LARGE)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(LARGE[1], 4).bfloat16()
        loss = (weight @ x).float().square().sum()
        [part] = torch.autograd.grad(loss, weight, retain_graph=True)
        expected += part
        loss.backward()
    assert torch.equal(weight.main_grad, expected)
    assert added == [weight.main_grad.data_ptr()] * 3
    assert found == [None] * 3


@pytest.mark.parametrize(
    "case",
    [
        {"shape": (SMALL - 1,)},
        {"dtype": torch.float32},
        {"total": torch.bfloat16},
        {"overlap": True},
        {"fused": True},
    ],
)
def test_what_megatron_has_its_own_way_for_is_left_to_it(case):
    assert add_gradients([chunk(**case)]) == 0
