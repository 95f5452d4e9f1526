"""A Ray that is safe to speak with: tokens on, dashboard off, loopback or TLS, or a refusal."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from kvkeep.addresses import is_loopback
from kvkeep.disagg.listening import exposed, family
from kvkeep.disagg.options import LinkOptions
from kvkeep.environment import environment
from kvkeep.errors import ConfigError

AUTO: Final = "auto"
"""A Ray of this process's own, on this machine alone."""
STORE_BYTES: Final = 96 << 20
"""For what Ray carries: commands and chunks, no pages."""
TLS_FILES: Final = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
PROBE_S: Final = 60.0

_ALWAYS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # devices are the engines' to choose
}
_LOOPBACK: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray listens at 127.0.0.1 and not everywhere; read when it is imported."""
_PROBE: Final = """
import os, sys
for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HOME"] = "/nonexistent"
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=b"", timeout=10)
except Exception as error:
    print(type(error).__name__, str(error)[:200])
else:
    print("let in")
"""


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be part of a Ray cluster; raises `ConfigError` for one that others could use.

    `auto` starts one on this machine that ends with this context.
    """
    check_address(address, os.environ)
    with tempfile.TemporaryDirectory(prefix="kvkeep-ray-") as folder:
        names = dict(_ALWAYS)
        near = address == AUTO or is_loopback(address.rpartition(":")[0])
        if near and not uses_tls(os.environ):
            names |= _LOOPBACK
        if address == AUTO:
            names |= _own_token(Path(folder))
        with environment(names):
            ray = _imported()
            try:
                _init(ray, address)
                check_cluster(ray, address)
                yield
            finally:
                ray.shutdown()


def uses_tls(environment: Mapping[str, str]) -> bool:
    """Tell whether Ray's own connections are under TLS; raises `ConfigError` for half of it."""
    if environment.get("RAY_USE_TLS", "0") not in {"1", "true", "True"}:
        return False
    for name in TLS_FILES:
        if not Path(environment.get(name, "")).is_file():
            raise ConfigError(f"cluster: RAY_USE_TLS is on and {name} names no file; set it")
    return True


def check_address(address: str, environment: Mapping[str, str]) -> None:
    """Refuse an address that must not be dialled as things are; raises `ConfigError`."""
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster: {address!r} is neither 'auto' nor HOST:PORT of a Ray head")
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ConfigError(
            "cluster: Ray's token authentication is off; set RAY_AUTH_MODE=token here and where"
            " the head and its nodes are started, and RAY_AUTH_TOKEN_PATH to the cluster's token"
        )
    if not uses_tls(environment) and not is_loopback(host):
        raise ConfigError(
            f"cluster: {host} is another machine and Ray speaks without TLS; set RAY_USE_TLS=1 and"
            f" {', '.join(TLS_FILES)} on all nodes, or use one on 127.0.0.1"
        )


def check_cluster(ray: Any, address: str) -> None:
    """Refuse a cluster that others could use; raises `ConfigError`."""
    tls = uses_tls(os.environ)
    for node in ray.nodes():
        host = node["NodeManagerAddress"]
        if node["Alive"] and not tls and not is_loopback(host):
            raise ConfigError(
                f"cluster: Ray's node {host} listens beyond this machine without TLS; start it with"
                " RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 to keep it on 127.0.0.1, or set RAY_USE_TLS=1"
            )
    own = ray._private.worker._global_node  # noqa: SLF001 - Ray has no other way to ask
    if own.address_info["webui_url"]:
        raise ConfigError(
            "cluster: Ray's dashboard is on, which runs what it is sent; start the head with"
            " --include-dashboard=false"
        )
    if address == AUTO:
        open_to = exposed(family(os.getpid()))
        if open_to and not tls:
            raise ConfigError(
                f"cluster: the Ray that was started listens at {open_to[0]}; use one of your own"
                " with RAY_USE_TLS=1 and --cluster HOST:PORT"
            )
    check_token(own.gcs_address)


def check_links(link: LinkOptions) -> None:
    """Refuse links that can't reach from node to node; raises `ConfigError`."""
    hosts = {node["NodeManagerAddress"] for node in import_module("ray").nodes() if node["Alive"]}
    if link.listen.startswith("shm:") and not all(is_loopback(host) for host in hosts):
        raise ConfigError(
            "cluster_shared_memory: workers on several machines share no memory; leave it out"
        )
    if link.tls is None and not all(is_loopback(host) for host in hosts):
        raise ConfigError(
            "cluster_certificate: workers on several machines hand pages over under TLS; give it,"
            " cluster_key and cluster_authority as they are called on every node"
        )


def check_token(address: str) -> None:
    """Refuse a cluster that lets in who has no token; raises `ConfigError`."""
    probe = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", _PROBE, address],
        capture_output=True,
        text=True,
        timeout=PROBE_S,
        check=False,
    )
    if "AuthenticationError" not in probe.stdout and "nauthenticated" not in probe.stdout:
        said = probe.stdout.strip() or f"the probe ended with {probe.returncode}"
        raise ConfigError(
            f"cluster: the Ray at {address} was asked without a token and did not refuse ({said});"
            " start its head and nodes with RAY_AUTH_MODE=token"
        )


def _init(ray: Any, address: str) -> None:
    own = {"include_dashboard": False, "num_cpus": 1, "object_store_memory": STORE_BYTES}
    refusals = (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, TimeoutError)
    try:
        ray.init(
            address="local" if address == AUTO else address,
            namespace="kvkeep",
            log_to_driver=False,
            configure_logging=False,
            **(own if address == AUTO else {}),
        )
    except refusals as error:
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cluster: no Ray can be joined at {address!r} ({said})") from None


def _own_token(folder: Path) -> dict[str, str]:
    """Return where a token of this cluster alone is, as Ray looks for it."""
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32), encoding="ascii")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def _imported() -> Any:
    """Return Ray, with the environment as it is now; raises `ConfigError` where there is none."""
    try:
        ray, core = import_module("ray"), import_module("ray._raylet")
    except ImportError:
        raise ConfigError("cluster: needs Ray; install kvkeep[cluster]") from None
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()
    return ray
