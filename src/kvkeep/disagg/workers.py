"""Workers as Ray actors: Ray carries commands and chunks, pages go over our own links.

What crosses is the bytes of `engine.messages`, as over the pipe of a process. A worker's engine is
a process of its own there too, or its step would wait for Ray's threads.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import msgspec

from kvkeep.disagg.listening import exposed
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.places import Places
from kvkeep.disagg.ray_cluster import uses_tls
from kvkeep.disagg.worker import transport_of
from kvkeep.engine import messages as m
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError

TURN_S: Final = 10.0
"""A worker that has nothing to say answers after so long, and is asked again."""

log = logging.getLogger(__name__)


class WorkerActor:
    """One worker: keeps commands in order, and its engine's replies until they are asked for."""

    def __init__(self, role: Role, engine: bytes, link: bytes, *, tls: bool) -> None:
        """`engine` and `link` are options as msgpack; without `tls` all must be loopback."""
        try:
            open_to = [] if tls else exposed([os.getpid()])
        except ConfigError as error:
            raise PermissionError(str(error)) from None
        if open_to:
            raise PermissionError(
                f"cluster: a Ray worker listens at {open_to[0]} without TLS; give Ray"
                " certificates (RAY_USE_TLS=1), or keep its nodes on 127.0.0.1"
            )
        self._transport = transport_of(
            role, msgspec.msgpack.decode(engine, type=EngineOptions), _here(link)
        )
        self._replies: collections.deque[bytes] = collections.deque()
        self._there = threading.Condition()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._ordering = threading.Lock()
        self._transport.start(self._told)

    def say(self, number: int, command: bytes) -> None:
        """Hand a command to the engine, after those with smaller numbers."""
        with self._ordering:
            self._early[number] = command
            while self._next in self._early:
                self._transport.send(m.decode_command(self._early.pop(self._next)))
                self._next += 1

    def hear(self) -> list[bytes]:
        """Return what the engine has said since the last call, once there is something."""
        with self._there:
            self._there.wait_for(lambda: self._replies, TURN_S)
            told = list(self._replies)
            self._replies.clear()
            return told

    def join(self, timeout_s: float) -> None:
        """Wait for the engine's end, then end it."""
        self._transport.join(timeout_s)

    def _told(self, reply: m.Reply) -> None:
        with self._there:
            self._replies.append(m.encode(reply))
            self._there.notify_all()


def _here(link: bytes) -> LinkOptions:
    """Return how pages pass from this node: under TLS at its own address, else on loopback."""
    options = msgspec.msgpack.decode(link, type=LinkOptions)
    if options.tls is None:
        return options
    ray = import_module("ray")
    return msgspec.structs.replace(options, listen=f"tcp://{ray.util.get_node_ip_address()}:0")


class RayTransport:
    """Carries messages to a worker that Ray has found a place for."""

    def __init__(
        self,
        name: str,
        role: Role,
        engine: EngineOptions,
        link: LinkOptions,
        places: Places,
        *,
        gpus: int = 0,
    ) -> None:
        """`gpus` are those that it has for itself."""
        self._name = name
        self._role = role
        self._places = places
        self._arguments = (role, msgspec.msgpack.encode(engine), msgspec.msgpack.encode(link))
        self._gpus = gpus
        self._number = 0
        self._sending = threading.Lock()
        self._actor: Any = None
        self._ended = threading.Event()

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Have Ray start the worker, and a thread that reads its replies."""
        ray = import_module("ray")  # half a second of imports, of clusters alone
        node = self._places.take(self, self._role, self._gpus, ray.nodes())
        strategies = import_module("ray.util.scheduling_strategies")
        self._actor = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=0,
                num_gpus=self._gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=4,
                # Soft would be anywhere where a node's daemon has not heard of the other one yet.
                scheduling_strategy="SPREAD"
                if node is None
                else strategies.NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(*self._arguments, tls=uses_tls(os.environ))
        )
        threading.Thread(
            target=self._read, args=(ray, deliver), name="kvkeep-replies", daemon=True
        ).start()

    def send(self, command: m.Command) -> None:
        """Hand a command over; a dead worker is told by the reading thread."""
        with self._sending:
            self._actor.say.remote(self._number, m.encode(command))
            self._number += 1

    def join(self, timeout_s: float) -> None:
        """Wait for the engine's end, then end the worker."""
        ray = import_module("ray")
        if not self._ended.is_set():
            try:
                ray.get(self._actor.join.remote(timeout_s), timeout=timeout_s + TURN_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.debug("worker %s: %s", self._name, type(error).__name__)
        self._ended.set()
        self._places.leave(self)
        ray.kill(self._actor)

    def _read(self, ray: Any, deliver: Callable[[m.Reply], None]) -> None:
        while not self._ended.is_set():
            try:
                told = ray.get(self._actor.hear.remote())
            except Exception as error:  # noqa: BLE001 - whatever ended it, clients must hear of it
                self._places.leave(self)
                deliver(self._failed(error))
                self._ended.set()
                return
            for raw in told:
                deliver(m.decode_reply(raw))

    def _failed(self, error: Exception) -> m.Failed:
        """Return what a client is told: a refusal's own words, and of other ends the kind."""
        _, refused, words = str(error).rpartition("PermissionError: ")
        if refused:
            return m.Failed("ConfigError", words.partition("\n")[0].strip())
        return m.Failed("EngineStopped", f"worker {self._name} ended ({type(error).__name__})")
