"""What comes before Qwen3's attention in a step of decoding takes the short way where it is plain."""

from types import SimpleNamespace

import pytest
import torch

from rollflow.engines.gpu.server_heads import attending, is_plain


class MHATokenToKVPool(SimpleNamespace):
    """SGLang's cache, as far as it is looked at."""


class RotaryEmbedding(SimpleNamespace):
    pass


class Attend:
    layer_id, k_scale = 3, None

    def __call__(self, *arguments, save_kv_cache):
        return ("attended", *arguments, save_kv_cache)


def cache(**changed):
    facts = {"dtype": torch.bfloat16, "store_dtype": torch.bfloat16, "is_quantized_kv_cache": False}
    facts |= {"get_key_buffer": lambda i: f"keys {i}", "get_value_buffer": lambda i: f"values {i}"}
    return MHATokenToKVPool(**(facts | changed))


def attention(**changed):
    norm = SimpleNamespace(variance_epsilon=1e-6, weight=torch.ones(8).bfloat16())
    rotary = {"is_neox_style": True, "rotary_dim": 8, "cos_sin_cache": torch.ones(4, 8)}
    facts = {"head_dim": 8, "q_norm": norm, "k_norm": norm, "rotary_emb": RotaryEmbedding(**rotary)}

    facts |= {"qkv_proj": lambda x: (("qkv", x), None), "o_proj": lambda x: (("out", x), None)}
    return SimpleNamespace(**(facts | {"attn": Attend()} | changed))


def step(*, decodes):
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decodes), out_cache_loc="slots"
    )


def forward(layer, kept, batch):
    short = attending(lambda *_: "SGLang's", lambda: kept, lambda *given: ("queries", *given))
    return short(layer, "positions", "hidden", batch)


def test_a_plain_step_of_decoding_takes_the_kernel_and_the_cache_is_full_before_attention():
    layer, batch = attention(), step(decodes=True)
    what, (_, queries, *rest) = forward(layer, cache(), batch)
    assert (what, rest) == ("out", [None, None, batch, False])
    assert queries[:2] == ("queries", ("qkv", "hidden"))
    assert queries[2] == (layer.q_norm.weight, layer.k_norm.weight, 1e-6)
    assert queries[3] is layer.rotary_emb.cos_sin_cache
    assert queries[4:] == ("positions", "slots", "keys 3", "values 3")


def test_prefill_is_left_to_sglang():
    assert forward(attention(), cache(), step(decodes=False)) == "SGLang's"


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.float16},
        {"store_dtype": torch.uint8},
        {"is_quantized_kv_cache": True},
    ],
)
def test_another_cache_is_left_to_sglang(changed):
    assert is_plain(attention(), cache())
    assert not is_plain(attention(), cache(**changed))
    assert forward(attention(), cache(**changed), step(decodes=True)) == "SGLang's"
    assert not is_plain(attention(), SimpleNamespace(**vars(cache())))


@pytest.mark.parametrize(
    "changed",
    [
        {"is_neox_style": False},
        {"rotary_dim": 4},
        {"cos_sin_cache": torch.ones(4, 8).bfloat16()},
    ],
)
def test_another_rotation_is_left_to_sglang(changed):
    rotary = RotaryEmbedding(**(vars(attention().rotary_emb) | changed))
    assert not is_plain(attention(rotary_emb=rotary), cache())
    assert not is_plain(attention(rotary_emb=SimpleNamespace(**vars(rotary))), cache())


def test_other_norms_and_scaled_keys_are_left_to_sglang():
    other = SimpleNamespace(variance_epsilon=1e-5, weight=torch.ones(8).bfloat16())
    assert not is_plain(attention(k_norm=other), cache())
    scaled = SimpleNamespace(layer_id=0, k_scale=torch.ones(1))
    assert not is_plain(attention(attn=scaled), cache())
