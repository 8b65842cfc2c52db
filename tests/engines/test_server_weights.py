"""What runs inside an SGLang server on a GPU, computed here on a CPU: checksums, and a bucket's way in."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow.engines import weights
from rollflow.engines.gpu import server_sums, server_weights
from rollflow.engines.gpu.told import read
from rollflow.engines.weights import bucket_layout

_32 = (1 << 32) - 1


def by_hand(words):
    """SGLang's ``gpu_tensor_hash`` in Python's own numbers."""

    def mixed(x):
        x ^= x >> 16
        x = x * 0x85EBCA6B & _32
        x ^= x >> 13
        x = x * 0xC2B2AE35 & _32
        return x ^ x >> 16

    def turned(x, bits):
        return (x << bits | x >> (32 - bits)) & _32

    total, size = 0, 4 * len(words)
    for start in range(0, len(words), 8192):
        high = low = 0
        for i, word in enumerate(words[start : start + 8192], start):
            word &= _32
            high += mixed(word ^ (i * 0x27D4EB2D + server_sums.SEEDS[0] & _32) ^ turned(i, 15))
            low += mixed(word ^ (i * 0x165667B1 + server_sums.SEEDS[1] & _32) ^ turned(i, 13))
        total += mixed(high & _32 ^ size) << 32 | mixed(low & _32 ^ size)
    return total & (1 << 64) - 1


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_a_hash_is_what_its_definition_says(words):
    assert server_sums.hash_of_words(torch.tensor(words, dtype=torch.int32)) == by_hand(words)


def test_a_hash_of_several_tiles_is_what_its_definition_says():
    words = torch.randint(-(2**31), 2**31, (2 * 8192 + 5,), dtype=torch.int32)
    assert server_sums.hash_of_words(words) == by_hand(words.tolist())


def test_checksums_are_told_in_the_order_of_the_tensors():
    tensors = [torch.randn(5, 3), torch.empty(0), torch.randn(7).bfloat16()]
    together = server_sums.checksums(tensors)
    assert together == [server_sums.checksums([t])[0] for t in tensors]
    assert together[1] == "0" * 16
    assert len(set(together)) == 3


def model_and_bucket(vocabulary=6):
    """SGLang's parameters, and the tensors of a bucket under their Hugging Face names."""
    parameters = {
        "model.embed_tokens.weight": torch.zeros(8, 4),
        "model.layers.0.self_attn.qkv_proj.weight": torch.zeros(8, 4),
        "model.norm.weight": torch.zeros(4),
    }
    named = [
        ("model.embed_tokens.weight", torch.randn(vocabulary, 4)),
        ("model.layers.0.self_attn.q_proj.weight", torch.randn(4, 4)),
        ("model.layers.0.self_attn.k_proj.weight", torch.randn(2, 4)),
        ("model.layers.0.self_attn.v_proj.weight", torch.randn(2, 4)),
        ("model.norm.weight", torch.randn(4)),
    ]
    return parameters, named


def flat(named):
    return torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in named])


@pytest.mark.parametrize("unaligned", [False, True])
def test_a_bucket_fills_the_parameters_and_leaves_the_padding(unaligned):
    parameters, named = model_and_bucket()
    places = server_weights.places_of(parameters, bucket_layout(named)[0])
    assert places is not None
    bucket = flat(named)
    server_weights.copy_into(places, torch.cat([bucket[:4], bucket])[4:] if unaligned else bucket)
    embedding, fused, norm = parameters.values()
    assert torch.equal(embedding[:6], named[0][1])
    assert not embedding[6:].any()
    assert torch.equal(fused, torch.cat([tensor for _, tensor in named[1:4]]))
    assert torch.equal(norm, named[4][1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p, n: p.pop("model.norm.weight"),
        lambda p, n: p.update({"model.norm.weight": torch.zeros(8)}),
        lambda p, n: p.update({"model.norm.weight": torch.zeros(4).bfloat16()}),
        lambda p, n: p.update({"model.embed_tokens.weight": torch.zeros(4, 8).t()}),
        lambda p, n: n.pop(3),
        lambda p, n: n.pop(1),
    ],
)
def test_what_does_not_fill_the_parameters_is_left_to_sglang(spoil):
    parameters, named = model_and_bucket()
    spoil(parameters, named)
    assert server_weights.places_of(parameters, bucket_layout(named)[0]) is None


def test_a_bucket_is_loaded_by_one_copy_or_by_sglang():
    parameters, named = model_and_bucket()
    for parameter in parameters.values():
        parameter.fill_(torch.nan)  # random weights, and memory that was given back meanwhile
    left = []
    load = server_weights._loading(lambda self, **bucket: left.append(bucket) or (True, "theirs"))
    model = SimpleNamespace(named_parameters=parameters.items)
    updater = SimpleNamespace(get_model=lambda: model)
    for tensors in (named, named[1:3]):
        content = {"flattened_tensor": flat(tensors), "metadata": bucket_layout(tensors)[0]}
        assert load(updater, flattened_tensor_bucket_dict=content)[0]
    assert torch.equal(parameters["model.norm.weight"], named[4][1])
    embedding = parameters["model.embed_tokens.weight"]
    assert torch.equal(embedding[:6], named[0][1])
    assert torch.equal(embedding[6:], torch.zeros(2, 4))
    assert len(left) == 1


def test_buckets_are_cut_where_a_fused_weight_begins():
    _, named = model_and_bucket()
    buckets = [[n for n, _ in bucket] for bucket, _ in weights._buckets(named, 64)]
    assert buckets == [[named[0][0]], [n for n, _ in named[1:4]], [named[4][0]]]


def test_weights_on_a_cpu_are_left_to_sglang_s_checker():
    module = SimpleNamespace(_build_quantized_set=lambda model: {})
    checker = SimpleNamespace(
        _get_model=lambda: None, _model_state=lambda: iter([("norm", torch.zeros(2))])
    )
    theirs = {"checksums": {"norm": "12"}}
    assert server_weights._checking(lambda self: theirs, module)(checker) is theirs


def checker_of(model, calls):
    """SGLang's checker over a model of plain PyTorch, said to be on a GPU."""
    module = SimpleNamespace(
        _build_quantized_set=lambda model: {},
        _build_check_entries=lambda state, skipped: (
            calls.append("search")
            or [SimpleNamespace(name=n, should_compare="inv_freq" not in n) for n in state]
        ),
        ChecksumInfo=lambda **facts: SimpleNamespace(model_dump=lambda: facts),
    )

    def state():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            yield name, SimpleNamespace(is_cuda=True, tensor=tensor)

    checker = SimpleNamespace(
        _get_model=lambda: model, _model_state=state, _parallelism_info=lambda: None
    )
    return server_weights._checking(lambda self: pytest.fail("left to SGLang"), module), checker


def test_checksums_are_of_what_the_model_holds_now_and_it_is_searched_once():
    linear, norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)
    model = torch.nn.Sequential(linear, norm)
    model.register_buffer("inv_freq", torch.ones(2))
    calls = []
    check, checker = checker_of(model, calls)

    def expected():
        return {n: server_sums.checksums([p])[0] for n, p in model.named_parameters()}

    first = check(checker)
    assert first["checksums"] == expected()
    assert first["per_gpu_checksum"] == server_weights._of_all(expected())
    with torch.no_grad():
        linear.weight.add_(1)
    assert check(checker)["checksums"] == expected() != first["checksums"]
    assert calls == ["search"]
    norm.bias = torch.nn.Parameter(torch.ones(2))
    assert check(checker)["checksums"] == expected()
    assert calls == ["search"] * 2


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("version", [None, "7"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_answer_to_the_last_bucket_tells_what_the_server_holds(
    monkeypatch, success, version, ranks
):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    done = []
    runner = SimpleNamespace(check_weights=lambda action: {"checksums": {"norm": action}})
    manager = SimpleNamespace(
        draft_worker=None,
        tp_cpu_group=None,
        tp_worker=SimpleNamespace(model_runner=runner),
        flush_cache=lambda empty_cache: done.append(empty_cache) or True,
    )
    answer = SimpleNamespace(success=success, message="Success")
    tell = server_weights._telling(lambda self, request: answer)
    tell(manager, SimpleNamespace(weight_version=version))
    found = read(answer.message + f" Weight version updated to {version}.")
    if success and version and ranks == 1:
        assert found is not None
        assert (found.checksums, found.flushed, done) == ({"norm": "checksum"}, True, [False])
        assert found.is_called(7)
        assert not found.is_called(8)
    else:
        assert (found, done, answer.message) == (None, [], "Success")


def test_the_sum_of_all_checksums_does_not_depend_on_their_order():
    told = {"b": "00ff", "a": "12"}
    assert server_weights._of_all(told) == hashlib.sha256(b"a12b00ff").hexdigest()
