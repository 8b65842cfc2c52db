"""Weights that are broadcast reach all servers whole, and no server that fails can hold up another."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollflow.engines.channel import Channel
from rollflow.engines.checksums import tally_of
from rollflow.engines.config import ModelConfig
from rollflow.engines.rollout import server_channel
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from rollflow.engines.weights import WeightMismatchError
from tests.engines import deaths
from tests.engines.json_servers import JsonServer, served

SHAPES = {
    "model.embed_tokens.weight": (64, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    **{f"model.layers.{n}.input_layernorm.weight": (80,) for n in range(8)},
    "model.norm.weight": (8,),
}
BUCKET_BYTES = 300
"""Of a bucket for each of these, but for those that are fused."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)


@pytest.fixture
def named():
    return [(name, torch.randn(shape)) for name, shape in SHAPES.items()]


class FakeServer(JsonServer):
    """What is ours in a server, over a dictionary in place of a model."""

    def __init__(self):
        super().__init__()
        self.weights, self.held, self.asked = {}, {}, []
        self.before_load = lambda number: None
        """Called with how many buckets the push brought before."""
        self.loads, self.drops = 0, False
        """Whether requests end without an answer from now on."""
        self.accepts, self.spoil = True, 0.0
        updater = SimpleNamespace(_update_weights_from_flattened_bucket=self.load)
        runner = SimpleNamespace(weight_updater=updater, check_weights=self.check)
        self.manager = SimpleNamespace(
            draft_worker=None,
            tp_cpu_group=None,
            tp_worker=SimpleNamespace(model_runner=runner),
            flush_cache=lambda empty_cache: True,
        )

    def load(self, flattened_tensor_bucket_dict):
        self.before_load(self.loads)
        self.loads += 1
        bytes_B = flattened_tensor_bucket_dict["flattened_tensor"]
        for meta in flattened_tensor_bucket_dict["metadata"]:
            flat = bytes_B[meta.start_idx : meta.end_idx].clone().view(meta.dtype)
            self.weights[meta.name] = flat.reshape(meta.shape) + self.spoil
        return self.accepts, "no room"

    def check(self, action):
        return {"checksums": tally_of(self.weights.items(), for_servers=True).server_checksums()}

    def respond(self, path, body):
        self.asked.append(path)
        self.loads = 0
        act = {
            "/init_weights_update_group": server_channel.join,
            "/update_weights_from_distributed": server_channel.update,
        }[path]
        handle = server_channel._ours(
            lambda self, request: pytest.fail("left to SGLang"),
            SimpleNamespace,
            lambda manager, request: act(self.held, manager, request),
        )
        answer = handle(self.manager, SimpleNamespace(**body))
        if answer.success and "weight_version" in body:
            answer.message += f" Weight version updated to {body['weight_version']}."
        return None if self.drops else (vars(answer), 200 if answer.success else 400)


@pytest.fixture
def servers():
    with served(FakeServer(), FakeServer()) as started:
        yield started


@pytest.fixture
def channel():
    channel = Channel("gloo", 10)
    yield channel
    channel.close()


def pushed(channel, named, servers, version, **rest):
    urls = [server.url for server in servers]
    return channel.push(named, urls, version, **{"bucket_bytes": BUCKET_BYTES, **rest})


def hold_these(servers, named):
    return all(
        server.weights.keys() == SHAPES.keys()
        and all(torch.equal(server.weights[name], tensor) for name, tensor in named)
        for server in servers
    )


@pytest.mark.parametrize("bucket_bytes", [1 << 30, BUCKET_BYTES, 1])
def test_every_server_gets_all_weights_by_one_request(channel, named, servers, bucket_bytes):
    result = pushed(channel, iter(named), servers, 3, bucket_bytes=bucket_bytes)
    assert result.servers == tuple(s.url for s in servers)
    assert result.failed == ()
    assert hold_these(servers, named)
    parts = result.parts
    assert result.seconds > parts["join"] + parts["call"] + parts["broadcast"] > 0
    for server in servers:
        assert server.asked == ["/init_weights_update_group", "/update_weights_from_distributed"]


def test_the_group_is_there_for_the_next_push_and_made_anew_for_other_servers(
    channel, named, servers
):
    for version in range(3):
        named = [(name, tensor + 1) for name, tensor in named]
        assert pushed(channel, named, servers, version).failed == ()
        assert hold_these(servers, named)
    assert servers[0].asked.count("/init_weights_update_group") == 1
    more = [(name, tensor + 1) for name, tensor in named]
    pushed(channel, more, servers[:1], 3)
    assert hold_these(servers[:1], more)
    assert hold_these(servers[1:], named)
    pushed(channel, more, servers, 4)
    assert hold_these(servers, more)
    assert servers[0].asked.count("/init_weights_update_group") == 3


def test_a_server_that_is_dead_before_is_named_and_the_rest_proceed(channel, named, servers):
    servers[0].server_close()
    result = pushed(channel, named, servers, 1)
    assert result.servers == (servers[1].url,)
    assert [url for url, _ in result.failed] == [servers[0].url]
    assert hold_these(servers[1:], named)


def test_a_server_that_dies_in_the_middle_is_named_with_those_that_it_takes_along(
    channel, named, servers
):
    def die(number):
        if number == 1:
            servers[0].drops = True
            raise RuntimeError("killed")

    servers[0].before_load = die
    started = time.monotonic()
    result = pushed(channel, named, servers, 1)
    assert time.monotonic() - started < 9
    assert result.servers == ()
    reasons = dict(result.failed)
    assert "RemoteProtocolError" in reasons[servers[0].url]
    assert f"because of {servers[0].url}: RemoteProtocolError" in reasons[servers[1].url]
    assert pushed(channel, named, servers[1:], 1).servers == (servers[1].url,)
    assert hold_these(servers[1:], named)
    servers[0].drops, servers[0].before_load = False, lambda number: None
    assert pushed(channel, named, servers, 2).failed == ()
    assert hold_these(servers, named)


def test_a_server_that_falls_silent_is_named_when_its_time_is_over(named, servers, monkeypatch):
    monkeypatch.setattr("rollflow.engines.channel.GRACE_S", 0.5)
    woken = threading.Event()
    servers[0].before_load = lambda number: number == 1 and woken.wait(20)
    with contextlib.closing(Channel("gloo", 1)) as channel:
        started = time.monotonic()
        result = pushed(channel, named, servers, 1)
        assert time.monotonic() - started < 5
        reasons = dict(result.failed)
        assert "no answer 0.5 s after" in reasons[servers[0].url]
        assert f"because of {servers[0].url}" in reasons[servers[1].url]
        assert pushed(channel, named, servers[1:], 1).servers == (servers[1].url,)
    woken.set()


def test_a_server_that_was_started_again_is_known_by_what_it_answers(channel, named, servers):
    pushed(channel, named, servers, 1)
    servers[0].held.clear()
    more = [(name, tensor + 1) for name, tensor in named]
    reasons = dict(pushed(channel, more, servers, 2).failed)
    assert "this server is not in" in reasons[servers[0].url]
    assert pushed(channel, more, servers, 2).failed == ()
    assert hold_these(servers, more)


def test_a_server_that_refuses_stops_the_run(channel, named, servers):
    servers[0].accepts = False
    assert len(pushed(channel, named, servers, 1).failed) == 2
    with pytest.raises(WeightMismatchError, match="no room"):
        pushed(channel, named, servers[:1], 1)


def test_a_server_that_holds_something_else_stops_the_run(channel, named, servers):
    servers[1].spoil = 1.0
    with pytest.raises(WeightMismatchError, match=f"{servers[1].url}.*holds other weights"):
        pushed(channel, named, servers, 1)
    servers[1].spoil = 0.0
    assert pushed(channel, named, servers, 1).failed == ()


def test_weights_that_cannot_be_exported_leave_no_server_waiting(channel, named, servers):
    def breaks():
        yield from named[:4]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        pushed(channel, breaks(), servers, 1)
    assert pushed(channel, named, servers, 1).failed == ()
    assert hold_these(servers, named)


def test_a_group_of_another_name_is_left_to_sglang():
    handle = server_channel._ours(lambda self, request: "theirs", None, None)  # pyright: ignore[reportArgumentType]
    assert handle(None, SimpleNamespace(group_name="weight_update_group")) == "theirs"


def model_at(folder):
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
    model.save_pretrained(folder)
    return [(name, p.detach()) for name, p in model.named_parameters()]


class Real:
    """SGLang's server on a CPU."""

    def __init__(self, folder, name):
        self.lease = PortLease()
        self.url = f"http://127.0.0.1:{self.lease.port}"
        table = {"skip_tokenizer_init": True, "mem_fraction_static": 0.5, "max_total_tokens": 256}
        settings = ModelConfig(path=str(folder / "model"))
        arguments = server_arguments(settings, table, "cpu", port=self.lease.port, seed=0)
        self.process = OwnedProcess("server", arguments, folder / f"{name}.log", "cpu")

    async def up(self):
        await wait_until_up("server", self.process, f"{self.url}/model_info", 240)

    def scheduler(self):
        """The process that holds the weights."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in children if "scheduler" in " ".join([p.name(), *p.cmdline()]))

    def end(self):
        self.process.kill()
        self.lease.release()


TRAINER = """
import sys, time, torch
from rollflow.engines.channel import Channel
def slowly():
    yield "model.norm.weight", torch.ones(32)
    yield "lm_head.weight", torch.ones(24, 32)
    print("half", flush=True)
    time.sleep(60)
Channel("gloo", 60).push(slowly(), [sys.argv[1]], 9, bucket_bytes=1)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checksums of a CPU server")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_real_servers_hold_what_was_broadcast_whoever_is_killed_in_the_middle(tmp_path):
    named = model_at(tmp_path / "model")
    real = [Real(tmp_path, name) for name in ("a", "b")]

    def changed(by):
        return [(name, tensor + by) for name, tensor in named]

    def killing(by, victim):
        for i, tensor in enumerate(changed(by)):
            if i == 8:
                victim()
            yield tensor

    try:
        for server in real:
            await server.up()
        a, b = (server.url for server in real)
        with contextlib.closing(Channel("gloo", 20)) as channel:
            for version in (1, 2):
                result = channel.push(changed(version), [a, b], version, bucket_bytes=4096)
                assert result.servers == (a, b)
            print(json.dumps(result.parts))
            started = time.monotonic()
            weights = killing(3, real[0].process.kill)
            reasons = dict(channel.push(weights, [a, b], 3, bucket_bytes=4096).failed)
            print(round(time.monotonic() - started, 2), reasons)
            assert time.monotonic() - started < 20
            assert a in reasons[b]
            assert reasons.keys() == {a, b}
            assert channel.push(changed(3), [b], 3).servers == (b,)
            real.append(Real(tmp_path, "c"))
            await real[2].up()
            c = real[2].url
            assert channel.push(changed(3), [c], 3).servers == (c,)
            assert channel.push(changed(4), [b, c], 4, bucket_bytes=4096).servers == (b, c)
            scheduler = real[1].scheduler()
            weights = killing(5, lambda: deaths.kill([scheduler]))
            reasons = dict(channel.push(weights, [b, c], 5, bucket_bytes=4096).failed)
            print(reasons)
            assert reasons.keys() == {b, c}
            assert channel.push(changed(5), [c], 5).servers == (c,)
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, c], stdout=subprocess.PIPE)
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"half\n"
        trainer.kill()
        trainer.communicate()
        started = time.monotonic()
        with contextlib.closing(Channel("gloo", 20)) as channel:
            assert channel.push(changed(6), [c], 6).servers == (c,)
        print(f"free again after {time.monotonic() - started:.2f} s")
        assert time.monotonic() - started < 10
    finally:
        for server in real:
            server.end()
