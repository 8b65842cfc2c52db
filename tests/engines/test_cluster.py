"""Joining a Ray that runs already."""

import pytest

from rollflow.engines import cluster
from rollflow.engines.config import ClusterConfig


def test_an_address_where_no_ray_listens_is_told_at_once():
    with pytest.raises(RuntimeError, match=r"cluster\.address = '127\.0\.0\.1:9': no Ray listens"):
        cluster.connect(ClusterConfig(address="127.0.0.1:9"), "nobody")
