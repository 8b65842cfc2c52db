"""Logits of decoding steps are left in bfloat16 where they are one plain product; else SGLang makes them."""

from types import SimpleNamespace

import pytest
import torch

from rollflow.engines.gpu.server_logits import adds, leaving, preparing

ROWS, HIDDEN, VOCABULARY = 3, 8, 11


def processor(**changes):
    plain = {
        "vocab_size": VOCABULARY,
        "logit_scale": None,
        "final_logit_softcapping": None,
        "use_fp32_lm_head": False,
        "rl_on_policy_target": None,
        "do_tensor_parallel_all_gather": False,
        "do_tensor_parallel_all_gather_dp_attn": False,
    }
    return SimpleNamespace(**(plain | changes))


def step(*, decodes=True, rows=ROWS, buffer=True):
    return SimpleNamespace(
        next_token_logits_buffer=torch.full((rows, VOCABULARY), 7.0) if buffer else None,
        forward_mode=SimpleNamespace(is_decode=lambda: decodes),
    )


def head(dtype=torch.bfloat16, **more):
    torch.manual_seed(1)
    return SimpleNamespace(weight=torch.randn(VOCABULARY, HIDDEN).to(dtype), **more)


def states(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(ROWS, HIDDEN).to(dtype)


def test_plain_logits_are_the_product_in_the_shared_buffer_and_the_numbers_of_a_float32_copy():
    def never(*_):
        raise AssertionError

    hidden, weights, at = states(), head(), step()
    logits = leaving(never, lambda: True)(processor(), hidden, weights, at)
    assert logits.dtype is torch.bfloat16
    assert torch.equal(logits, hidden @ weights.weight.T)
    assert logits.data_ptr() == at.next_token_logits_buffer.data_ptr()
    assert logits.is_contiguous()
    assert (at.next_token_logits_buffer.flatten()[-ROWS:] == 7).all()


@pytest.mark.parametrize(
    "case",
    [
        {"processor": processor(logit_scale=0.5)},
        {"processor": processor(final_logit_softcapping=30.0)},
        {"processor": processor(use_fp32_lm_head=True)},
        {"processor": processor(rl_on_policy_target="fsdp")},
        {"processor": processor(do_tensor_parallel_all_gather=True)},
        {"processor": processor(do_tensor_parallel_all_gather_dp_attn=True)},
        {"processor": processor(vocab_size=VOCABULARY - 1)},
        {"lm_head": head(torch.float32)},
        {"lm_head": head(set_lora=None)},
        {"lm_head": head(quant_method=SimpleNamespace())},
        {"lm_head": SimpleNamespace()},
        {"hidden_states": states(torch.float16)},
        {"logits_metadata": step(decodes=False)},
        {"logits_metadata": step(buffer=False)},
        {"logits_metadata": step(rows=ROWS + 1)},
        {"embedding_bias": torch.zeros(VOCABULARY)},
        {"use_logits_buffer": False},
        {"wanted": False},
    ],
)
def test_whatever_is_not_plain_is_left_to_sglang(case):
    asked = {
        "hidden_states": states(),
        "lm_head": head(),
        "logits_metadata": step(),
        "embedding_bias": None,
        "use_logits_buffer": True,
    } | case
    wanted, one = asked.pop("wanted", True), asked.pop("processor", processor())
    found = leaving(lambda *given: given, lambda: wanted)(one, **asked)
    assert found[0] is one
    assert all(a is b for a, b in zip(found[1:], asked.values(), strict=True))


def info(**changes):
    nothing = {
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "penalizer_orchestrator": SimpleNamespace(is_required=False),
        "logit_bias": None,
        "has_custom_logit_processor": False,
        "grammars": [],
    }
    return SimpleNamespace(**(nothing | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"grammars": None, "penalizer_orchestrator": None}, False),
        ({"acc_additive_penalties": torch.zeros(1)}, True),
        ({"acc_scaling_penalties": torch.zeros(1)}, True),
        ({"penalizer_orchestrator": SimpleNamespace(is_required=True)}, True),
        ({"logit_bias": torch.zeros(1)}, True),
        ({"has_custom_logit_processor": True}, True),
        ({"grammars": [None, object()]}, True),
    ],
)
def test_what_is_to_be_changed_is_float32_before(changes, expected):
    seen = []
    asked = info(**changes)
    output = SimpleNamespace(next_token_logits=torch.zeros(1, dtype=torch.bfloat16))
    whole = preparing(lambda _, output, info: seen.append((output.next_token_logits.dtype, info)))
    whole(None, output, asked)
    assert seen == [(torch.float32 if expected else torch.bfloat16, asked)]
    assert adds(asked) is expected
