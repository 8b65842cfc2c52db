"""A Ray head with two nodes beside it, all on loopback: prints its address, and ends with its standard input.

``python -m tests.flows.ray_nodes FOLDER``, with Ray's settings in the environment: Ray reads whether
it asks for a token when it is imported, so this is a process of its own.
"""

import sys
from pathlib import Path

from ray._private import ray_constants
from ray.cluster_utils import Cluster

from rollflow.engines.cluster import OBJECT_STORE_BYTES

NODE = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.1"}


def main() -> None:
    """Start the nodes, wait, end them."""
    ray_constants.ENABLE_RAY_CLUSTER = False  # as in engines/cluster.py: else all interfaces answer
    Path("/tmp/ray").mkdir(exist_ok=True)  # Ray notes its newest head there
    head = {**NODE, "include_dashboard": False, "temp_dir": sys.argv[1]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**NODE)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
