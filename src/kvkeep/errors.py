"""Every error kvkeep raises on purpose.

KvkeepError
├── ConfigError                a setting is wrong: names the field and the remedy
├── ModelError                 a checkpoint can't be used
│   ├── ModelNotFound          no such directory or hub id
│   ├── UnsupportedModel       a family or feature outside the supported set, by the field's name
│   └── CheckpointError        missing, truncated or contradictory files
├── RequestError               a client's request can't be served: HTTP status and field
│   ├── InvalidRequest         400
│   ├── Unauthenticated        401
│   ├── Forbidden              403
│   ├── PayloadTooLarge        413
│   └── TooManyRequests        429
├── CapacityError              memory for pages is used up
│   ├── PoolExhausted          no free tile in the pool
│   └── QuotaExceeded          a tenant's reserved share is used up
├── KernelInputError           arrays handed to a kernel do not fit together
├── SealError                  sealed bytes do not open in the reader's context
│   ├── KeysGone               the keys of these bytes were destroyed, or never were
│   └── KeysUnavailable        the key process or its provider does not answer now
├── WireError                  a link between workers carries what it should not
│   └── LinkLost               it has ended, or nothing comes any more
├── AuditError                 a target can't be audited: it doesn't answer, or refuses
└── EngineError                the engine itself failed
    ├── EngineStopped          it is shutting down or has died
    │   └── PrefillLost        of a cluster, the worker that was to compute a prompt
    ├── PartLost               pages of a running request that another worker held
    ├── NonFiniteKV            a key or value that a codec can't store: the request fails
    ├── RequestCancelled       cancelled by its client or by revocation
    └── DeadlineExceeded       the request's own deadline passed
"""

from __future__ import annotations

from typing import ClassVar


class KvkeepError(Exception):
    """Base of all kvkeep errors."""


class ConfigError(KvkeepError):
    """A setting is wrong; the message names the field and the remedy."""


class ModelError(KvkeepError):
    """A checkpoint can't be used."""


class ModelNotFound(ModelError):
    """No checkpoint under this path or id."""


class UnsupportedModel(ModelError):
    """The checkpoint uses a feature outside the supported set."""


class CheckpointError(ModelError):
    """Checkpoint files are missing, truncated or contradict each other."""


class RequestError(KvkeepError):
    """A client's request can't be served; `param` names the field, never its value."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field is malformed, out of range or not supported."""


class Unauthenticated(RequestError):
    """No valid API key."""

    status = 401
    code = "invalid_api_key"


class Forbidden(RequestError):
    """The key is valid but may not do this."""

    status = 403
    code = "permission_denied"


class PayloadTooLarge(RequestError):
    """The body is larger than the configured cap."""

    status = 413
    code = "payload_too_large"


class TooManyRequests(RequestError):
    """The tenant's own concurrency or queue cap is reached."""

    status = 429
    code = "rate_limit_exceeded"


class CapacityError(KvkeepError):
    """Memory for pages is used up."""


class PoolExhausted(CapacityError):
    """No free tile is left in the pool."""


class QuotaExceeded(CapacityError):
    """A tenant's reserved share of the pool is used up."""


class KernelInputError(KvkeepError):
    """Arrays handed to a kernel do not fit together."""


class SealError(KvkeepError):
    """Sealed bytes do not open in the reader's context."""


class KeysGone(SealError):
    """The keys of these bytes were destroyed, or never were."""


class KeysUnavailable(SealError):
    """The key process or its provider does not answer now."""


class WireError(KvkeepError):
    """What came over a link between workers is not what this worker can use."""


class LinkLost(WireError):
    """A link between workers has ended, or nothing comes over it any more."""


class AuditError(KvkeepError):
    """A target can't be audited: it doesn't answer as expected, or refuses."""


class EngineError(KvkeepError):
    """The engine itself failed."""


class EngineStopped(EngineError):
    """The engine is shutting down or has died."""


class PartLost(EngineError):
    """Pages of a running request that another worker held can't be attended to any more."""


class PrefillLost(EngineStopped):
    """The worker that was to compute a prompt has died; another may."""


class NonFiniteKV(EngineError):
    """A key or value is infinite, not a number or out of a codec's range."""

    def __init__(self, what: str, head: int, layer: int | None = None) -> None:
        where = f"KV head {head}" if layer is None else f"layer {layer}, KV head {head},"
        super().__init__(
            f"{what} of {where} isn't finite in a page that was to be coded: run this"
            " prompt with pages in the model's dtype, or check the model's weights"
        )
        self.what = what
        """`K` or `V`."""
        self.head = head
        self.layer = layer

    def in_layer(self, layer: int) -> NonFiniteKV:
        """Return the same error with its layer named."""
        return NonFiniteKV(self.what, self.head, layer)


class RequestCancelled(EngineError):
    """The request was cancelled by its client or by revocation."""


class DeadlineExceeded(EngineError):
    """The request's own deadline passed."""


def unexpected(error: BaseException) -> str:
    """Return the kind of a fault and the line it comes from, and none of its words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
    return f"{type(error).__name__} at {file}:{trace.tb_lineno}"
