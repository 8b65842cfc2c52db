"""Weights reach servers whole, are verified there, and no server can hold up another."""

import base64
import contextlib
import hashlib
import pickle
import socket
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollflow.engines import weights
from rollflow.engines.checksums import Tally, server_name, tally_of, weights_digest
from rollflow.engines.config import ModelConfig
from rollflow.engines.gpu.told import told
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from rollflow.engines.weights import WeightMismatchError, push, verify
from tests.engines.json_servers import JsonServer, served

LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (24, 8),
    LAYER + "self_attn.q_proj.weight": (8, 8),
    LAYER + "self_attn.k_proj.weight": (4, 8),
    LAYER + "self_attn.v_proj.weight": (4, 8),
    LAYER + "mlp.gate_proj.weight": (6, 8),
    LAYER + "mlp.up_proj.weight": (6, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (64, 8),
}


@pytest.fixture
def named():
    torch.manual_seed(0)
    return [(name, torch.randn(shape)) for name, shape in SHAPES.items()]


class FakeServer(JsonServer):
    """SGLang's verbs over a dictionary: loads buckets, fuses, pads, tells checksums and version."""

    version = "default"

    def __init__(self):
        super().__init__()
        self.weights, self.spoil = {}, False
        self.tells = {}
        """Of the answer to the last bucket: ``flushed``, and the version that it names; empty where
        it is no server of ours."""
        self.calls = []
        """Requests in order: loads, and flushes, the first of which finds the server busy."""

    def respond(self, path, body):
        if path.startswith("/flush_cache"):
            self.calls.append("flush")
            return {}, 200 if self.calls.count("flush") > 1 else 400
        if path == "/update_weights_from_tensor":
            self.load(body)
            return {"success": True, "message": self.message(body)}, 200
        if path == "/model_info":
            self.calls.append("info")
            return {"weight_version": self.version}, 200
        self.calls.append("check")
        assert (path, body) == ("/weights_checker", {"action": "checksum"})
        return {"ranks": [{"checksums": self.checksums()}]}, 200

    def load(self, body):
        [payload] = body["serialized_named_tensors"]
        bucket = pickle.loads(base64.b64decode(payload))
        for meta in bucket["metadata"]:
            flat = bucket["flattened_tensor"][meta.start_idx : meta.end_idx]
            self.weights[meta.name] = flat.view(meta.dtype).reshape(meta.shape).clone()
        assert not body["flush_cache"]
        self.calls.append("load")
        self.version = body.get("weight_version", self.version)

    def message(self, body):
        if "weight_version" not in body:
            return "Success"
        version = f" Weight version updated to {self.tells.get('version', self.version)}."
        ours = told(self.checksums(), flushed=self.tells["flushed"]) if self.tells else ""
        return f"Success{ours}{version}"

    def checksums(self):
        parts = {}
        for name, tensor in self.weights.items():
            multiple = 32 if "mlp" in name else 64 if "embed" in name or "head" in name else 1
            padding = torch.zeros(-len(tensor) % multiple, *tensor.shape[1:])
            parts.setdefault(server_name(name)[0], []).append(torch.cat([tensor, padding]))
        fused = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if self.spoil:
            fused["model.norm.weight"] = fused["model.norm.weight"] + 1
        return {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
            for name, tensor in fused.items()
        }


@pytest.fixture
def servers():
    with served(FakeServer(), FakeServer()) as started:
        yield started


def test_the_digest_does_not_depend_on_the_order_but_on_every_bit(named):
    digest = weights_digest(named)
    assert weights_digest(reversed_but_fused_in_order(named)) == digest
    for i, (name, tensor) in enumerate(named):
        changed = tensor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        assert weights_digest([*named[:i], (name, changed), *named[i + 1 :]]) != digest


def reversed_but_fused_in_order(named):
    return [*named[6:], *named[:6]]


def test_parts_of_a_fused_weight_must_come_in_order(named):
    tally = Tally()
    with pytest.raises(ValueError, match=r"k_proj.*as part 0 of.*qkv_proj"):
        tally.add(*named[2])


def test_experts_are_what_the_server_fuses_them_to_in_whatever_order_they_come():
    """Expert parallel ranks give 0, 2, 1, 3."""
    layer, torch_random = "model.layers.3.mlp.experts", torch.Generator().manual_seed(0)
    gates, ups, downs = (torch.randn(4, 32, 32, generator=torch_random) for _ in range(3))
    tally = Tally()
    for e in (0, 2, 1, 3):
        for name, of in (("up", ups), ("gate", gates), ("down", downs)):
            tally.add(f"{layer}.{e}.{name}_proj.weight", of[e])
            if name == "up" and e == 2:
                with pytest.raises(ValueError, match="w13_weight lacks its part 2"):
                    tally.server_checksums()
    fused = {"w13_weight": torch.stack([gates, ups], 1), "w2_weight": downs}
    assert tally.server_checksums() == {
        f"{layer}.{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        for name, tensor in fused.items()
    }


@pytest.mark.parametrize("bucket_bytes", [1 << 30, 300])
def test_every_server_gets_all_weights_and_the_version(named, servers, monkeypatch, bucket_bytes):
    monkeypatch.setattr(weights, "BUCKET_BYTES", bucket_bytes)
    result = push(named, [s.url for s in servers], 7, timeout_s=10)
    assert result.servers == tuple(s.url for s in servers)
    assert result.failed == ()
    assert (result.version, result.digest) == (7, weights_digest(named))
    assert result.bytes == sum(t.nbytes for _, t in named)
    for server in servers:
        assert server.version == "7"
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in named)
        loads = server.calls.count("load")
        assert server.calls[:loads] == ["load"] * loads
        assert sorted(server.calls[loads:]) == ["check", "flush", "flush", "info"]
    open_files = [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
    assert not any("rollflow-weights" in name for name in open_files)


@pytest.mark.parametrize("bucket_bytes", [1 << 30, 300])
def test_a_server_that_tells_what_it_holds_is_asked_for_nothing_else(named, servers, bucket_bytes):
    servers[0].tells = {"flushed": True}
    push(named, [servers[0].url], 7, timeout_s=10, bucket_bytes=bucket_bytes)
    assert set(servers[0].calls) == {"load"}


@pytest.mark.parametrize(
    ("tells", "asked"),
    [({"flushed": False}, {"flush"}), ({"flushed": True, "version": 6}, {"info"})],
)
def test_a_server_is_asked_for_what_it_did_not_tell(named, servers, tells, asked):
    servers[0].tells = tells
    assert push(named, [servers[0].url], 7, timeout_s=10).servers
    assert set(servers[0].calls) == {"load"} | asked


def test_a_server_that_tells_that_it_holds_something_else_stops_the_run(named, servers):
    servers[0].tells, servers[0].spoil = {"flushed": True}, True
    with pytest.raises(WeightMismatchError, match=r"first model\.norm\.weight"):
        push(named, [servers[0].url], 1, timeout_s=10)


def test_parcels_are_packed_ahead_one_at_a_time_and_given_up_at_the_end(named, servers):
    packed = []

    @contextlib.contextmanager
    def watched(bucket):
        packed.append(len(bucket))
        with weights.mapped_file(bucket) as post:
            yield post
        packed.append(-len(bucket))

    parcels = weights.Parcels(named, watched, 300)
    parcels.pack()
    parcels.pack()
    assert packed == [1]
    tally = tally_of(named, for_servers=True)
    result = push(named, [servers[0].url], 2, timeout_s=10, counted=tally, parcels=parcels)
    assert result.servers == (servers[0].url,)
    assert all(torch.equal(servers[0].weights[name], tensor) for name, tensor in named)
    assert packed[1::2] == [-n for n in packed[::2]]
    assert sum(packed[::2]) == len(named)
    assert 0 <= result.parts["pack"] < parcels.seconds["pack"]


def test_parcels_that_nobody_sends_are_given_up(named):
    given_up = []

    @contextlib.contextmanager
    def watched(bucket):
        yield lambda client, version: None
        given_up.append(bucket)

    parcels = weights.Parcels(named, watched)
    parcels.pack()
    assert given_up == []
    parcels.close()
    assert len(given_up) == 1


def test_a_dead_and_a_silent_server_are_named_and_the_rest_proceed(named, servers):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead_url = f"http://127.0.0.1:{free.getsockname()[1]}"
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        result = push(named, [dead_url, servers[0].url, silent_url], 1, timeout_s=0.5)
        assert time.monotonic() - started < 5
    assert result.servers == (servers[0].url,)
    assert dict(result.failed).keys() == {dead_url, silent_url}
    assert "ConnectError" in dict(result.failed)[dead_url]
    assert "ReadTimeout" in dict(result.failed)[silent_url]


def test_a_server_that_holds_something_else_stops_the_run(named, servers):
    servers[1].spoil = True
    with pytest.raises(WeightMismatchError, match=rf"{servers[1].url}.*first model\.norm\.weight"):
        push(named, [s.url for s in servers], 1, timeout_s=10)


def test_a_server_that_says_another_version_stops_the_run(named, servers):
    push(named, [servers[0].url], 1, timeout_s=10)
    tally = Tally()
    for name, tensor in named:
        tally.add(name, tensor)
    with httpx.Client(base_url=servers[0].url, trust_env=False) as client:
        verify(client, tally.server_checksums(), 1)
        with pytest.raises(WeightMismatchError, match="says weight version '1' after version 2"):
            verify(client, tally.server_checksums(), 2)


def test_without_servers_the_digest_is_still_told(named):
    result = push(named, [], 3, timeout_s=1)
    assert result.digest == weights_digest(named)
    assert (result.servers, result.failed) == ((), ())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checksums of a CPU server")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_real_server_holds_what_was_pushed(tmp_path):
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        changed = [(name, p.detach() + 0.5) for name, p in model.named_parameters()]
    lease = PortLease()
    settings = ModelConfig(path=str(tmp_path / "model"))
    table = {"skip_tokenizer_init": True}
    arguments = server_arguments(settings, table, "cpu", port=lease.port, seed=0)
    process = OwnedProcess("server", arguments, tmp_path / "server.log", "cpu")
    url = f"http://127.0.0.1:{lease.port}"
    try:
        await wait_until_up("server", process, f"{url}/model_info", 240)
        result = push(changed, [url], 5, timeout_s=60)
        assert result.servers == (url,)
        process.kill()
        assert push(changed, [url], 6, timeout_s=5).failed[0][0] == url
    finally:
        process.kill()
        lease.release()
