"""A stand-in for Vault's and OpenBao's transit engine: its HTTP API, derived keys, versions."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TOKEN = "s.token"


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Transit(ThreadingHTTPServer):
    """Serves `/v1/transit`; keys are lists of versions."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys: dict[str, list[bytes]] = {}
        self.derived: dict[str, bool] = {}
        self.deletable: set[str] = set()
        self.status: int | None = None
        """What everything is answered with, where it is set."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: list[str], body: dict[str, Any]) -> dict[str, Any] | None:
        match method, path:
            case "GET", ["keys", name]:
                self._versions(name)
                return {"derived": self.derived[name], "latest_version": len(self.keys[name])}
            case (("POST" | "PUT"), ["keys", name]):
                self.keys.setdefault(name, [os.urandom(32)])
                self.derived[name] = bool(body.get("derived"))
            case (("POST" | "PUT"), ["keys", name, "config"]):
                if body.get("deletion_allowed"):
                    self.deletable.add(name)
            case (("POST" | "PUT"), ["keys", name, "rotate"]):
                self._versions(name).append(os.urandom(32))
            case "DELETE", ["keys", name]:
                if name not in self.deletable:
                    raise Refusal(400, "deletion is not allowed for this key")
                del self.keys[name]
            case (("POST" | "PUT"), ["encrypt", name]):
                return {"ciphertext": self._seal(name, body["plaintext"], body["context"])}
            case (("POST" | "PUT"), ["decrypt", name]):
                return {"plaintext": self._open(name, body["ciphertext"], body["context"])}
            case (("POST" | "PUT"), ["rewrap", name]):
                plain = self._open(name, body["ciphertext"], body["context"])
                return {"ciphertext": self._seal(name, plain, body["context"])}
            case _:
                raise Refusal(404, "no handler for route")
        return None

    def _versions(self, name: str) -> list[bytes]:
        if name not in self.keys:
            raise Refusal(404, "")
        return self.keys[name]

    def _cipher(self, name: str, version: int, context: str) -> AESGCM:
        if name not in self.keys:
            raise Refusal(400, "encryption key not found")
        key = self.keys[name][version - 1]
        return AESGCM(hmac.digest(key, base64.b64decode(context), hashlib.sha256))

    def _seal(self, name: str, plaintext: str, context: str) -> str:
        version = len(self.keys.get(name, ()))
        nonce = os.urandom(12)
        cipher = self._cipher(name, version, context)
        raw = nonce + cipher.encrypt(nonce, base64.b64decode(plaintext), None)
        return f"vault:v{version}:{base64.b64encode(raw).decode()}"

    def _open(self, name: str, ciphertext: str, context: str) -> str:
        _, version, text = ciphertext.split(":")
        raw = base64.b64decode(text)
        try:
            cipher = self._cipher(name, int(version[1:]), context)
            return base64.b64encode(cipher.decrypt(raw[:12], raw[12:], None)).decode()
        except InvalidTag:
            raise Refusal(400, "cipher: message authentication failed") from None


class _Handler(BaseHTTPRequestHandler):
    server: Transit

    def _do(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        try:
            self._admit()
            _, version, mount, *rest = self.path.split("/")
            assert (version, mount) == ("v1", "transit")
            data = self.server.answer(self.command, rest, body)
        except Refusal as refusal:
            self._send(refusal.status, {"errors": [str(refusal)] if str(refusal) else []})
        else:
            self._send(200 if data is not None else 204, {"data": data})

    do_GET = do_POST = do_PUT = do_DELETE = _do  # noqa: N815 - as the base names them

    def _admit(self) -> None:
        if self.server.status is not None:
            raise Refusal(self.server.status, "told to refuse")
        if self.headers.get("X-Vault-Token") != TOKEN:
            raise Refusal(403, "permission denied")

    def _send(self, status: int, document: dict[str, Any]) -> None:
        raw = b"" if status == 204 else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base has it
        return


@contextmanager
def transit() -> Iterator[Transit]:
    """A running stand-in."""
    with Transit() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
