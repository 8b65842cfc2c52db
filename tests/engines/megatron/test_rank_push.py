"""What a push begins with is ready before anybody waits for it, and goes the way that suits the GPUs."""

import contextlib
from types import SimpleNamespace

import httpx
import pytest
import torch

from rollflow.engines import weights
from rollflow.engines.channel import Channel
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron import rank as module
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.server import wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from rollflow.engines.weights import PushResult


@pytest.fixture
def events():
    return []


@pytest.fixture
def make(monkeypatch, events, tmp_path):
    named = [("model.norm.weight", torch.ones(4)), ("lm_head.weight", torch.ones(4, 4))]

    @contextlib.contextmanager
    def transport(bucket):
        events.append("pack")
        yield lambda client, version: events.append(f"load {version}")
        events.append("free")

    def push(named, urls, version, *, parcels, **rest):
        parcels = parcels or weights.Parcels(named, transport)
        with httpx.Client() as client, contextlib.closing(parcels):
            for parcel in parcels:
                parcel.post(client, version)
        return PushResult(version, "", 0, 0.0, tuple(urls))

    monkeypatch.setattr(module, "cuda_ipc", transport)
    monkeypatch.setattr(module.weights, "push", push)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(module, "export_weights", lambda model: iter(named))

    class Learner:
        model = None

        class trainer:
            push_timeout_s = 1.0

    def build(**way):
        return module.Rank(Learner(), ModelConfig(path=str(tmp_path)), **way)  # pyright: ignore[reportArgumentType]

    return SimpleNamespace(rank=build, push=push, transport=transport)


@pytest.fixture
def rank(make):
    return make.rank(shares_gpu=True)


def test_after_the_first_push_the_first_bucket_is_packed_with_the_digest(rank, events):
    rank._forget()
    digest = rank.digest()
    assert events == []  # nobody has asked for weights yet
    rank.push(["http://a"], 1, "")
    assert events == ["pack", "load 1", "free"]
    rank._forget()
    events.clear()
    assert rank.digest() == rank.digest() == digest
    assert events == ["pack"]
    rank.push(["http://a"], 2, "")
    assert events == ["pack", "load 2", "free"]
    rank.push(["http://a"], 2, "")  # a server that was started again
    assert events[3:] == ["pack", "load 2", "free"]


def test_weights_that_change_before_they_are_pushed_are_given_up(rank, events):
    rank.push(["http://a"], 1, "")
    rank._forget()
    events.clear()
    rank.digest()
    rank._forget()
    assert events == ["pack", "free"]


def test_nothing_is_packed_where_no_server_is(rank, events):
    rank.push([], 1, "")
    rank._forget()
    events.clear()
    rank.digest()
    assert events == []


def test_where_servers_have_gpus_of_their_own_weights_are_broadcast(make, events, monkeypatch):
    class Fake:
        transport = staticmethod(make.transport)

        def push(self, named, urls, version, **rest):
            events.append(f"to {len(urls)}")
            return make.push(named, urls, version, parcels=rest["parcels"])

    rank = make.rank(channel=Fake())
    digest = rank.digest()
    rank.push(["http://a", "http://b"], 1, "")
    assert events == ["to 2", "pack", "load 1", "free"]
    rank._forget()
    events.clear()
    assert rank.digest() == digest
    assert events == ["pack"]
    rank.push(["http://a", "http://b"], 2, "")
    assert events == ["pack", "to 2", "load 2", "free"]
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    rank._forget()
    events.clear()
    assert rank.digest() == digest
    assert events == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checksums of a CPU server")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_real_server_holds_what_a_rank_broadcast_before_and_after_a_step(
    one_rank, run, tmp_path
):
    with one_rank() as trainer, contextlib.closing(Channel("gloo", 30)) as channel:
        lease = PortLease()
        table = {"skip_tokenizer_init": True, "mem_fraction_static": 0.5, "max_total_tokens": 256}
        model = ModelConfig(path=trainer._live._model.path)
        arguments = server_arguments(model, table, "cpu", port=lease.port, seed=0)
        process = OwnedProcess("server", arguments, tmp_path / "server.log", "cpu")
        url = f"http://127.0.0.1:{lease.port}"
        try:
            await wait_until_up("server", process, f"{url}/model_info", 240)
            trainer._live._channel = channel
            first = trainer.push_weights([url], 0)
            trained = trainer.train(run.commit(0))
            assert trainer._live._parcels is not None, "the first bucket is packed with the digest"
            second = trainer.push_weights([url], 1)
        finally:
            process.kill()
            lease.release()
    assert first.servers == second.servers == (url,)
    assert first.digest != second.digest == trained.weights_digest
