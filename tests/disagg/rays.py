"""Ray clusters of several nodes on this machine, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_NODES = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for _ in range(int(sys.argv[1]) - 1):
    cluster.add_node(num_cpus=1)
print(cluster.gcs_address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def ray_nodes(count: int, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the address of a cluster of so many nodes, all on loopback."""
    names = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}
    command = [sys.executable, "-c", _NODES, str(count)]
    with subprocess.Popen(
        command, env=names, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nodes:
        try:
            assert nodes.stdout is not None
            yield nodes.stdout.readline().strip()
        finally:
            nodes.communicate()
