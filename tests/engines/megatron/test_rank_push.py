"""A rank that shares its GPU with servers has what a push begins with ready before anybody waits for it."""

import contextlib

import httpx
import pytest
import torch

from rollflow.engines import weights
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron import rank as module
from rollflow.engines.weights import PushResult


@pytest.fixture
def events():
    return []


@pytest.fixture
def rank(monkeypatch, events, tmp_path):
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
    monkeypatch.setattr(module, "export_weights", lambda model: iter(named))

    class Learner:
        model = None

        class trainer:
            push_timeout_s = 1.0

    return module.Rank(Learner(), ModelConfig(path=str(tmp_path)), shares_gpu=True)  # pyright: ignore[reportArgumentType]


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
