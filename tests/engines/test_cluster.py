"""Joining a Ray that runs already, and what joining leaves alone."""

import signal

import pytest

from rollflow.engines import cluster
from rollflow.engines.config import ClusterConfig


def test_an_address_where_no_ray_listens_is_told_at_once():
    with pytest.raises(RuntimeError, match=r"cluster\.address = '127\.0\.0\.1:9': no Ray listens"):
        cluster.connect(ClusterConfig(address="127.0.0.1:9"), "nobody")


def test_sigterm_is_left_to_whoever_has_it(monkeypatch):
    def start(config, namespace):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
        return ""

    monkeypatch.setattr(cluster, "_start", start)
    before = signal.getsignal(signal.SIGTERM)
    cluster.connect(ClusterConfig(), "test")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_ray_that_does_not_come_up_is_told_in_a_line_and_leaves_no_folder(monkeypatch, tmp_path):
    def overloaded(*_):
        raise Exception("the node timed out")

    monkeypatch.setattr(cluster, "_start_private", overloaded)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(cluster.DeadlineError, match="did not start: the node timed out"):
        cluster.connect(ClusterConfig(device="cpu"), "test")
    assert list(tmp_path.glob("*/*")) == []
