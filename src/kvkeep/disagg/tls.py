"""TLS between workers: each proves itself by the cluster's authority, and a refusal is named."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509

from kvkeep.disagg.options import TlsFiles
from kvkeep.errors import ConfigError

LOOK: Final = "look at cluster_certificate and cluster_authority of both workers"


def context_of(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """Return a context in which either side proves itself by the cluster's authority.

    Raises `ConfigError` for files that are none, or a certificate whose time is over.
    """
    purpose = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # workers move between hosts; the authority is the cluster's own
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise ConfigError(
            f"cluster_certificate: {files.certificate} and its cluster_key {files.key} can't be"
            f" used: {error.strerror}; give PEM files that belong together"
        ) from None
    try:
        context.load_verify_locations(files.authority)
    except OSError as error:
        raise ConfigError(
            f"cluster_authority: {files.authority} can't be used: {error.strerror}; give a PEM file"
        ) from None
    _check_time(Path(files.certificate))
    return context


def refusal(error: OSError) -> str | None:
    """Return what a handshake failed for, and where to look; None: not for TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the other worker's certificate is refused ({error.verify_message})"
    elif not isinstance(error, ssl.SSLError):
        return None
    elif "ALERT" in (error.reason or ""):
        words = (error.reason or "").partition("ALERT_")[2].replace("_", " ").lower()
        why = f"this worker's certificate is refused by the other ({words})"
    else:
        why = "the other worker speaks no TLS"
    return f"{why}; {LOOK}"


def _check_time(file: Path) -> None:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    now = dt.datetime.now(dt.UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins <= now <= ends:
        raise ConfigError(
            f"cluster_certificate: {file} holds from {begins:%Y-%m-%d %H:%M} to"
            f" {ends:%Y-%m-%d %H:%M} UTC; have the cluster's authority sign another"
        )
