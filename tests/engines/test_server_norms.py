"""A layer without norms of its own computes what a layer with them does, where it is plain, and follows new weights."""

import ast
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from rollflow.engines.gpu import server_norms
from rollflow.engines.gpu.server_norms import KEPT, UPDATES, fold, passing, updating

WEIGHT_UPDATER = "sglang/srt/model_executor/model_runner_components/weight_updater.py"
WRITERS = {
    "load_weights",
    "load_weights_and_postprocess",
    "_model_load_weights_direct",
    "custom_weight_loaders",
    "copy_",
}
HIDDEN, WIDE, HEAD, TOKENS = 32, 48, 8, 5
EPSILON = 1e-6


class MHATokenToKVPool(SimpleNamespace):
    """SGLang's cache, as far as it is looked at."""


class RotaryEmbedding(SimpleNamespace):
    pass


class UnquantizedLinearMethod:
    pass


class Product(torch.nn.Module):
    def __init__(self, columns, rows):
        super().__init__()
        self.weight = torch.nn.Parameter((torch.randn(columns, rows) / rows**0.5).bfloat16())
        self.weight.requires_grad = False
        self.bias, self.quant_method = None, UnquantizedLinearMethod()


class Norm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter((torch.rand(size) + 0.5).bfloat16(), requires_grad=False)
        self.variance_epsilon, self.variance_size_override = EPSILON, None


class Attend:
    """Instead of attention: a function of the queries."""

    layer_id, k_scale = 3, None

    def __call__(self, queries, _keys, _values, _batch, save_kv_cache=False):
        assert not save_kv_cache
        return queries.tanh()


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = Product(3 * HEAD, HIDDEN), Product(HIDDEN, HEAD)
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)
        self.head_dim, self.attn = HEAD, Attend()
        self.rotary_emb = RotaryEmbedding(
            is_neox_style=True, rotary_dim=HEAD, cos_sin_cache=torch.ones(4, HEAD)
        )


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = Product(2 * WIDE, HIDDEN), Product(HIDDEN, WIDE)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN), Norm(HIDDEN)
        self.self_attn, self.mlp = Attention(), Mlp()


class Kernels:
    """What the kernels compute, in plain PyTorch."""

    @staticmethod
    def queries_of(qkv, _weights, _turns, positions, slots, keys, values, stream):
        assert (positions, slots, keys, values) == ("positions", "slots", "keys 3", "values 3")
        scale = (stream.float().square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        return (qkv * scale).bfloat16()[:, :HEAD]

    @staticmethod
    def swiglu_of(gate_up, stream, epsilon):
        scale = (stream.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        gate, up = (gate_up.float() * scale).chunk(2, -1)
        return (silu(gate) * up).bfloat16()


CACHE = MHATokenToKVPool(
    dtype=torch.bfloat16,
    store_dtype=torch.bfloat16,
    is_quantized_kv_cache=False,
    get_key_buffer=lambda i: f"keys {i}",
    get_value_buffer=lambda i: f"values {i}",
)
BATCH = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True), out_cache_loc="slots")


def exact(layer, stream):
    """The layer in float64, with norms of its own."""

    def normed(x, norm):
        return rms_norm(x, (HIDDEN,), norm.weight.double(), EPSILON)

    attention, mlp = layer.self_attn, layer.mlp
    qkv = linear(normed(stream, layer.input_layernorm), attention.qkv_proj.weight.double())
    stream = stream + linear(qkv[:, :HEAD].tanh(), attention.o_proj.weight.double())
    gate_up = linear(
        normed(stream, layer.post_attention_layernorm), mlp.gate_up_proj.weight.double()
    )
    gate, up = gate_up.chunk(2, -1)
    return stream + linear(silu(gate) * up, mlp.down_proj.weight.double())


def forward(layer, stream, *, residual=None, batch=BATCH, cache=CACHE, **more):
    short = passing(lambda *_, **__: "SGLang's", lambda: cache, Kernels)
    return short(layer, "positions", stream, batch, residual, **more)


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = torch.nn.ModuleList([Layer(), Layer()])
    fold(found, Layer, float("inf"))
    return found


def test_layers_compute_what_those_with_norms_of_their_own_do(model):
    stream = (3 * torch.randn(TOKENS, HIDDEN)).bfloat16()
    expected = exact(model[1], exact(model[0], stream.double()))
    between, residual = forward(model[0], stream.clone())
    found, last = forward(model[1], between, residual=residual)
    assert last is None
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()


def test_what_an_ordinary_layer_left_to_be_added_is_added(model):
    hidden, residual = torch.randn(2, TOKENS, HIDDEN).bfloat16()
    expected = exact(model[0], (hidden + residual).double())
    found, _ = forward(model[0], hidden, residual=residual)
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()


def test_after_an_update_of_weights_the_layer_has_the_new_ones_folded_once(model, monkeypatch):
    stream = torch.randn(TOKENS, HIDDEN).bfloat16()
    before, _ = forward(model[0], stream.clone())
    folded = []
    once = server_norms.fold_again
    monkeypatch.setattr(server_norms, "fold_again", lambda m: (folded.append(m), once(m)))
    updater, running = SimpleNamespace(get_model=lambda: model), []

    def write(_self, number):
        for parameter in model.parameters():
            parameter.mul_(number)
        return True, "Success"

    inner = updating(write, running)
    assert updating(inner, running)(updater, 0.5) == (True, "Success")
    assert folded == [model]
    found, _ = forward(model[0], stream.clone())
    expected = exact(model[0], stream.double())
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()
    assert (found - before).norm() > 0.1 * before.norm()


def test_a_refused_update_touches_no_weights_which_may_be_asleep(model, monkeypatch):
    monkeypatch.setattr(server_norms, "fold_again", lambda _: pytest.fail("touched"))
    updater, running = SimpleNamespace(get_model=lambda: model), []
    refused = updating(lambda _self: (False, "no such group"), running)
    assert refused(updater) == (False, "no such group")

    def broken(_self):
        raise RuntimeError("half a push")

    with pytest.raises(RuntimeError, match="half a push"):
        updating(broken, running)(updater)
    assert running == []


def test_all_that_writes_weights_in_sglang_is_known():
    """By its source: what writes, or calls what does, is one of ours or called by one of ours alone."""
    file = Path(str(distribution("sglang").locate_file(WEIGHT_UPDATER)))
    [updater] = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "WeightUpdater"
    ]
    calls = {
        method.name: {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)}
        | {n.id for n in ast.walk(method) if isinstance(n, ast.Name)}
        for method in updater.body
        if isinstance(method, ast.FunctionDef)
    }
    assert set(UPDATES) <= set(calls)
    writers = {name for name, called in calls.items() if called & WRITERS}
    assert {"update_weights_from_disk", "_update_weights_from_flattened_bucket"} <= writers
    for writer in writers - set(UPDATES):
        callers = {name for name, called in calls.items() if writer in called}
        assert callers and callers <= set(UPDATES), writer


def test_second_forms_are_not_among_the_weights(model):
    assert not any(KEPT in name for name in model.state_dict())


def test_a_model_whose_second_forms_are_too_large_is_left_to_sglang():
    model = torch.nn.ModuleList([Layer()])
    size = 2 * (3 * HEAD + 2 * WIDE) * HIDDEN
    fold(model, Layer, size - 1)
    assert forward(model[0], torch.randn(TOKENS, HIDDEN).bfloat16()) == "SGLang's"
    fold(model, Layer, size)
    assert forward(model[0], torch.randn(TOKENS, HIDDEN).bfloat16()) != "SGLang's"


def test_prefill_another_cache_and_an_addition_of_somebody_else_are_left_to_sglang(model):
    stream = torch.randn(TOKENS, HIDDEN).bfloat16()
    prefill = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: False))
    assert forward(model[0], stream, batch=prefill) == "SGLang's"
    other = MHATokenToKVPool(**{**vars(CACHE), "dtype": torch.float16})
    assert forward(model[0], stream, cache=other) == "SGLang's"
    assert forward(model[0], stream, post_residual_addition=stream) == "SGLang's"


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp.down_proj, "bias", torch.zeros(HIDDEN)),
        lambda layer: setattr(layer.self_attn.qkv_proj, "quant_method", object()),
        lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1e-5),
        lambda layer: setattr(layer.post_attention_layernorm, "variance_size_override", 8),
        lambda layer: layer.input_layernorm.float(),
        lambda layer: setattr(layer.self_attn.rotary_emb, "is_neox_style", False),
    ],
)
def test_other_products_and_norms_are_left_to_sglang_and_have_no_second_form(model, change):
    change(model[0])
    assert forward(model[0], torch.randn(TOKENS, HIDDEN).bfloat16()) == "SGLang's"
    torch.manual_seed(0)
    another = torch.nn.ModuleList([Layer()])
    change(another[0])
    fold(another, Layer, float("inf"))
    assert not hasattr(another[0], KEPT)
