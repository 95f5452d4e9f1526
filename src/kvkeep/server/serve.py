"""Runs the public and the admin port in one event loop until a signal, then drains."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import uvicorn
from starlette.applications import Starlette

from kvkeep.engine.api import EngineClient
from kvkeep.errors import ConfigError
from kvkeep.server.admin import create_admin_app
from kvkeep.server.app import create_app
from kvkeep.server.cluster import Workers
from kvkeep.server.frontend import Frontend
from kvkeep.server.options import Bind, ServerOptions
from kvkeep.server.protocol import numbered
from kvkeep.server.store import TenantStore
from kvkeep.server.text import TextModel

_HANG_UP_S = 2.0
"""What clients get to read the end of their cancelled streams."""

_IDLE_S = 75
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the server listens, ports filled in."""

    public: Bind
    admin: Bind


async def serve(
    client: EngineClient,
    text: TextModel,
    tenants: TenantStore,
    options: ServerOptions,
    *,
    public: Bind,
    admin: Bind,
    admin_token: str,
    announce: Callable[[Listening], None] | None = None,
    workers: Workers | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, let running requests end, and close the engine.

    `workers` are a cluster's, for the admin port.

    Raises `ConfigError` for a port in use, an admin port that others can reach, and `no_auth` off
    loopback.
    """
    check_binds(public, admin, options)
    app = create_app(client, text, tenants, options)
    front: Frontend = app.state.frontend
    with _listening(public) as public_socket, _listening(admin) as admin_socket:
        listening = Listening(_bound(public, public_socket), _bound(admin, admin_socket))
        servers = _Servers(
            front,
            _server(app, lifespan=True, grace_s=options.drain_s + _HANG_UP_S),
            _server(
                create_admin_app(front, admin_token, workers), lifespan=False, grace_s=_HANG_UP_S
            ),
        )
        try:
            await servers.run(
                public_socket, admin_socket, lambda: announce(listening) if announce else None
            )
        finally:
            await client.close()


def check_binds(public: Bind, admin: Bind, options: ServerOptions) -> None:
    """Raise `ConfigError` where a port would be open to more than it may be."""
    if options.no_auth and not public.is_local():
        raise ConfigError("no_auth: only for a loopback host; bind 127.0.0.1 or add tenants")
    if not admin.is_local():
        raise ConfigError("admin host: must be loopback or a Unix socket")


def check_free(*binds: Bind) -> None:
    """Raise `ConfigError` where something else listens: better known before a model is loaded."""
    for bind in binds:
        with _listening(bind):
            pass


class _Server(uvicorn.Server):
    """A server that leaves signals to us, there being two in one loop, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Servers:
    """The two ports and the way they end."""

    def __init__(self, front: Frontend, public: _Server, admin: _Server) -> None:
        self._front = front
        self._public = public
        self._admin = admin
        self._overtime: asyncio.TimerHandle | None = None

    async def run(
        self, public: socket.socket, admin: socket.socket, announce: Callable[[], None]
    ) -> None:
        """Serve both until the public one has ended; raises what the engine failed with."""
        with _on_signals(self._stop):
            tasks = [
                asyncio.create_task(self._admin.serve([admin])),
                asyncio.create_task(self._public.serve([public])),
            ]
            try:
                await asyncio.gather(self._admin.listening.wait(), self._public.listening.wait())
                await self._front.started()
                announce()
                await asyncio.wait(tasks[1:])
            finally:
                if not self._public.should_exit:
                    self._stop()
                await asyncio.wait(tasks[1:])
                self._admin.should_exit = True
                if self._overtime is not None:
                    self._overtime.cancel()
                await asyncio.gather(*tasks)

    def _stop(self) -> None:
        """Drain at the first signal, end at once at the second."""
        self._front.drain()
        if self._public.should_exit:
            self._front.stop_running()
            self._public.force_exit = True
            return
        self._public.should_exit = True
        loop = asyncio.get_running_loop()
        self._overtime = loop.call_later(self._front.options.drain_s, self._front.stop_running)


def _server(app: Starlette, *, lifespan: bool, grace_s: float) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=numbered(),  # type: ignore[arg-type]
            ws="none",
            lifespan="on" if lifespan else "off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=math.ceil(grace_s),
        )
    )


@contextmanager
def _listening(bind: Bind) -> Iterator[socket.socket]:
    sock = _unix_socket(bind) if bind.unix is not None else _tcp_socket(bind)
    try:
        yield sock
    finally:
        sock.close()
        if bind.unix is not None:
            bind.unix.unlink(missing_ok=True)


def _tcp_socket(bind: Bind) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((bind.host.strip("[]"), bind.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port: can't listen on {bind.host}:{bind.port} ({error.strerror}); choose another"
        ) from None
    return sock


def _unix_socket(bind: Bind) -> socket.socket:
    """Return a listening socket for this user alone; one left by a dead server is replaced."""
    path = bind.unix
    assert path is not None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and sock.connect_ex(str(path)) != 0:
            path.unlink()
        sock.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"socket: can't listen on {path} ({error.strerror}); choose another path"
        ) from None
    return sock


def _bound(bind: Bind, sock: socket.socket) -> Bind:
    return bind if bind.unix is not None else replace(bind, port=sock.getsockname()[1])


@contextmanager
def _on_signals(callback: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        for number in signals:
            loop.add_signal_handler(number, callback)
    except (RuntimeError, ValueError):
        yield  # not the main thread: whoever runs us has the signals
        return
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
