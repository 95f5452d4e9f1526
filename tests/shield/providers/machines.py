"""A machine that attests, as a tree like the kernel's, and a verifier that knows it."""

from __future__ import annotations

import base64
import hmac
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvkeep.shield.attestation import bound_data
from kvkeep.shield.providers.attested import release_key, release_label

SIGNER = b"the maker's key"


def signed(data: bytes, measurement: bytes) -> bytes:
    """A report as this test's machines sign it."""
    body = measurement.ljust(16) + data
    return body + hmac.digest(SIGNER, body, "sha256")


class Machine:
    """An entry of reports: two pipes and what the kernel keeps beside them."""

    def __init__(self, path: Path, measurement: bytes = b"good") -> None:
        self.path = path
        self.measurement = measurement
        self.strangers = 0
        """Writes of others that come between, still to happen."""
        self.quotes = 0
        self.replayed: bytes | None = None
        """A report that is given whatever is asked."""
        path.mkdir()
        for name in ("inblob", "outblob"):
            os.mkfifo(path / name)
        self.generation = 0
        self._tell()
        (path / "provider").write_text("sev_guest\n")
        (path / "auxblob").write_bytes(b"certificates")
        self._over = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over = True
        with suppress(OSError), (self.path / "inblob").open("wb") as pipe:
            pipe.write(b"end")
        self._thread.join(5)

    def _tell(self) -> None:
        (self.path / "generation").write_text(f"{self.generation}\n")

    def _serve(self) -> None:
        while True:
            data = (self.path / "inblob").read_bytes()
            if self._over:
                return
            self.quotes += 1
            self.generation += 1
            if self.strangers:
                self.strangers -= 1
                self.generation += 1
            self._tell()
            (self.path / "outblob").write_bytes(self.replayed or signed(data, self.measurement))


class Verifier:
    """Releases one key to machines of one measurement."""

    def __init__(self) -> None:
        self.keys = {"kek": os.urandom(32)}
        self.nonces: set[bytes] = set()
        self.measurement = b"good"
        self.only: dict[str, bytes] = {}
        """Measurements of the machines that keys are for, of those that are for one alone."""
        self.releases = 0
        self.says: dict[str, tuple[int, bytes]] = {}
        """(status, body) in place of an answer, by path."""
        self.url = ""

    def answer(self, path: str, told: dict[str, str]) -> tuple[int, bytes]:
        if path in self.says:
            return self.says[path]
        if path == "/v1/challenge":
            nonce = os.urandom(32)
            self.nonces.add(nonce)
            return 200, _encoded(nonce=nonce)
        nonce, public, report = (
            base64.b64decode(told[name]) for name in ("nonce", "public", "report")
        )
        if nonce not in self.nonces or not self._holds(
            report, bound_data(nonce, public), self.only.get(told["key"], self.measurement)
        ):
            return 403, b""
        self.nonces.remove(nonce)
        assert (told["provider"], base64.b64decode(told["auxiliary"])) == (
            "sev_guest",
            b"certificates",
        )
        own = X25519PrivateKey.generate()
        shared = own.exchange(X25519PublicKey.from_public_bytes(public))
        mine = own.public_key().public_bytes_raw()
        cipher = AESGCM(release_key(shared, nonce, public, mine))
        key = self.keys[told["key"]]
        wrapped = cipher.encrypt(bytes(12), key, release_label(told["key"]))
        self.releases += 1
        return 200, _encoded(public=mine, wrapped=wrapped)

    def _holds(self, report: bytes, data: bytes, measurement: bytes) -> bool:
        return report == signed(data, measurement)


@contextmanager
def verifier() -> Iterator[Verifier]:
    """A verifier that listens on this machine."""
    one = Verifier()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            status, body = one.answer(self.path, json.loads(self.rfile.read(length)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield one
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def machine(path: Path) -> Iterator[Machine]:
    """A machine that attests by an entry."""
    one = Machine(path)
    try:
        yield one
    finally:
        one.close()


def _encoded(**fields: bytes) -> bytes:
    return json.dumps({k: base64.b64encode(v).decode() for k, v in fields.items()}).encode()
