"""Every setting in one model: flags win over `KVKEEP_*` variables, these over `kvkeep.toml`.

Flags are the field names with dashes; names are vLLM's where the meaning is the same.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvkeep.errors import ConfigError
from kvkeep.fitting import check_together
from kvkeep.naming import check_keys

ENV_PREFIX: Final = "KVKEEP_"
DEFAULT_FILE: Final = Path("kvkeep.toml")
CONSENT_PATH: Final = "/.well-known/kvkeep-audit-consent"
"""Where a server says that it may be audited from another machine."""
FORMER_POLICIES: Final = {"nothing": "isolate", "all": "share_all"}
"""Names of earlier versions."""
DEMO_MODEL: Final = Path(__file__).parent / "demo"
"""The checkpoint that comes with the package."""

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Load = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """What one kvkeep process is told; read-only once made. Make one with `load`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    config: Path | None = Field(None, description="settings file (default: kvkeep.toml, if there)")

    model: str = Field(str(DEMO_MODEL), description="checkpoint directory or hub id")
    served_model_name: str | None = Field(None, description="name shown to clients")
    allow_download: bool = Field(False, description="fetch a hub id that isn't on this machine")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="arithmetic and KV")
    weights: Literal["float", "int8"] = Field("float", description="int8: per output channel")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where model and cache live")
    kernel: Literal["auto", "avx512", "avx2", "portable", "reference", "triton"] = Field(
        "auto", description="code path; reference is the slow oracle"
    )
    threads: Count | None = Field(None, description="kernel threads (default: every core)")

    max_model_len: Count | None = Field(None, description="tokens of prompt and answer together")
    max_num_seqs: Count = Field(64, description="sequences in one step")
    max_num_batched_tokens: Count = Field(512, description="tokens in one step")
    kv: Literal["bf16", "k8v8", "k4v4", "k4v2", "k2v2", "calibrated", "auto"] = Field(
        "bf16", description="how pages are stored: as computed, or in so many bits for K and V"
    )
    kv_auto_tokens: Count = Field(
        2048, description="longest prompt, with up to 512 tokens of answer, not coded (auto)"
    )
    kv_auto_codec: Literal["k8v8", "k4v4", "k4v2", "k2v2", "calibrated"] = Field(
        "k4v2", description="form of longer requests' pages (auto)"
    )
    kv_auto_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="part of the memory for pages that are not coded (auto)"
    )
    kv_window_tokens: Count = Field(
        128, description="recent tokens that stay as computed where pages are coded, in 128s"
    )
    guard_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="part of coded or evicting requests that run beside a shadow"
    )
    guard_samples: Count = Field(
        8, description="shadowed requests of a tenant after which it may step back"
    )
    guard_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.05, description="mean nats between request and shadow above which a tenant steps back"
    )
    guard_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="part of the memory for shadows and tenants that stepped back (not auto)"
    )
    guard_state: Path | None = Field(
        None, description="file of steps back over restarts (default: beside the keys)"
    )
    kv_cache_memory_bytes: ByteSize | None = Field(
        None, description="memory for pages, such as 4GiB (default: 4GiB or half of what is free)"
    )
    evict: Literal["off", "corm", "corm-paper"] = Field(
        "off", description="forget, per layer and KV head, tokens that recent queries ignore"
    )
    evict_window: Count | None = Field(None, description="latest queries that keep a token (w)")
    evict_prompt_rows: Count | None = Field(
        None, description="latest queries of a prompt that decide what its end keeps (up to w)"
    )
    evict_recent: Count | None = Field(None, description="latest tokens that always stay (r)")
    evict_weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="times the mean weight from which a token counts as looked at (c)"
    )
    evict_most: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="part of a query's weight above which nothing is asked of a token"
    )
    evict_spread: Annotated[int, Field(ge=0)] | None = Field(
        None, description="tokens after one that counts as looked at that count with it"
    )
    evict_cap: Count | None = Field(
        None, description="most tokens a layer's KV head keeps, once w rows were observed"
    )
    evict_observe_every: Count | None = Field(
        None, description="observe one query in so many of an answer"
    )
    shield: Literal["off", "seal", "tile", "perm", "orth", "mask", "tee"] | None = Field(
        None, description="how pages are kept from who reads them (default: seal, with a tier)"
    )
    shield_keys: str | None = Field(
        None,
        description="who wraps sealing keys: file:, env:, fd:, vault:, kms:, pkcs11: or attested:",
    )
    shield_store: Path | None = Field(
        None, description="file of wrapped sealing keys (default: beside the keys)"
    )
    transform_key: Path | None = Field(
        None, description="file of 32 bytes, the key of perm, orth and mask (default: random)"
    )
    transform_epoch: Annotated[int, Field(ge=0)] = Field(
        0, description="another epoch is another key: its pages are not found"
    )
    shield_dumps: bool = Field(
        False, description="let an engine that seals write cores and be attached to by its user"
    )
    seed: int = Field(0, ge=0, description="base of the random generators")

    prefix_caching: bool = Field(True, description="keep pages for later requests")
    tier: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="where pages go that memory has no room for: memory:4GiB, disk:DIR,64GiB"
        " or redis://HOST:PORT/DB,64GiB",
    )
    attention_planner: Literal["tree", "flat"] = Field(
        "tree", description="tree: a prefix that several requests hold is read once a step"
    )
    attention_share_across_tenants: Literal["public", "never"] = Field(
        "public", description="never: no tenant's decoding is sped up by another's"
    )
    attention_cost_model: Path | None = Field(
        None, description="coefficients of the planner, JSON (default: measured at start)"
    )
    share: Literal["isolate", "selective", "dp", "pinned", "salt", "safekv", "share_all"] = Field(
        "selective", description="which pages tenants share"
    )
    unsafe_share_all: bool = Field(
        False, description="confirm safekv or share_all: they leak by timing"
    )
    share_k: Annotated[int, Field(ge=2)] = Field(
        4, description="tenants beside the reader that must have sent a page (selective)"
    )
    share_eps: Annotated[float, Field(gt=0, le=16)] = Field(
        1.0, description="odds that one tenant may change, as a logarithm (dp)"
    )
    share_delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(
        1e-6, description="chance that the odds say more (dp)"
    )
    share_epoch_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0, description="time between two snapshots of what is shared"
    )
    share_life_epochs: Annotated[int, Field(ge=2)] = Field(
        60, description="epochs that a page stays shared unless it is sent again; dp: a window"
    )
    share_units_per_day: Count = Field(
        1024, description="units of 256 tokens that one tenant may vote for in a day"
    )
    share_pool: Annotated[float, Field(ge=0, le=0.9)] = Field(
        0.3, description="part of the pool for shared pages, where any tenant shares"
    )
    share_state: Path | None = Field(
        None, description="file of votes over restarts (default: beside the keys)"
    )
    share_pinned: Path | None = Field(
        None, description="TOML file of prefixes public from the start"
    )
    share_rules: Path | None = Field(
        None, description="TOML file of the organisation's own rules for what stays private"
    )
    share_classifier: Path | None = Field(
        None, description="local token classifier or GLiNER model that reads prompts too"
    )
    share_gate: bool = Field(
        False, description="hold first tokens back for what young shared pages saved"
    )
    share_audit_log: Path | None = Field(
        None, description="file of the monitor's alerts, JSON lines"
    )
    share_webhook: str | None = Field(None, description="URL that alerts are posted to")

    cluster: str | None = Field(
        None, description="workers on Ray: auto (on this machine), or HOST:PORT of a Ray head"
    )
    cluster_prefill: Annotated[int, Field(ge=0)] = Field(
        1, description="workers that compute long prompts (cluster)"
    )
    cluster_decode: Count = Field(1, description="workers that answer (cluster)")
    cluster_prefill_most: Count | None = Field(
        None, description="start and end prefill workers by load, up to so many (cluster)"
    )
    cluster_decode_most: Count | None = Field(
        None, description="and decode workers: the load of all moves who is cached where (cluster)"
    )
    cluster_prefill_load: Load = Field(
        2.0, description="requests under way on a prefill worker that are enough (cluster)"
    )
    cluster_decode_load: Load = Field(
        8.0, description="requests under way on a decode worker that are enough (cluster)"
    )
    cluster_scale_s: PositiveSeconds = Field(
        300.0, description="load is looked at, and a worker of a role moved, so often (cluster)"
    )
    cluster_least_tokens: Count = Field(
        512, description="shorter prompts are computed where they are answered (cluster)"
    )
    cluster_epoch_s: PositiveSeconds = Field(
        5.0, description="workers join and leave at the ends of epochs of this length (cluster)"
    )
    cluster_silence_s: PositiveSeconds = Field(
        60.0, description="a worker that says nothing for so long is replaced (cluster)"
    )
    cluster_link_gbit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Gbit/s between machines: kv = auto codes what is long on it (cluster)"
    )
    cluster_token_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="that a prompt's token takes: rows that link brings later are computed"
    )
    cluster_link_wait_s: Seconds = Field(
        0.1, description="and this is long: prompts that 16-bit pages would take longer for"
    )
    cluster_attend_apart: Count | None = Field(
        None, description="prompts so long stay where they were computed, read there (cluster)"
    )
    cluster_shared_memory: bool = Field(
        False, description="pages pass through memory: workers of one machine alone (cluster)"
    )
    cluster_certificate: Path | None = Field(
        None, description="PEM file of a worker's certificate, on every node (cluster)"
    )
    cluster_key: Path | None = Field(None, description="PEM file of its key (cluster)")
    cluster_authority: Path | None = Field(
        None, description="PEM file of who signs the cluster's certificates (cluster)"
    )

    host: str = Field("127.0.0.1", description="public address")
    port: Port = Field(8000, description="public port")
    admin_host: str = Field("127.0.0.1", description="admin address, loopback only")
    admin_port: Port = Field(8001, description="admin port")
    admin_socket: Path | None = Field(None, description="admin Unix socket, in place of the port")
    admin_token_file: Path | None = Field(None, description="file that holds the admin token")
    audit_consent_file: Path | None = Field(
        None, description="file of a token shown to all: who repeats it may audit this server"
    )
    keys: Path = Field(Path("kvkeep-keys.json"), description="API keys of the tenants")
    no_auth: bool = Field(False, description="no keys: loopback only, a tenant per connection")

    max_body_bytes: ByteSize = Field(ByteSize(4 << 20), description="largest request body")
    max_n: Count = Field(16, description="largest n of one request")
    max_stops: Count = Field(16, description="most stop strings of one request")
    no_auth_concurrency: Count = Field(256, description="requests at a time under --no-auth")
    deadline_s: PositiveSeconds | None = Field(None, description="longest run of one request")
    drain_s: Seconds = Field(30.0, description="wait for running requests at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of stderr")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put flags before the environment before the file."""
        named = init_settings().get("config") or env_settings().get("config")
        file = InitSettingsSource(settings_cls, read_file(Path(named) if named else None))
        return init_settings, env_settings, file

    @field_validator("tier", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        """Take several from one line, parted by blanks."""
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("share", mode="before")
    @classmethod
    def _today(cls, value: object) -> object:
        """Take a policy's former name for the present one."""
        return FORMER_POLICIES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_together(self)
        return self


def read_file(named: Path | None) -> dict[str, object]:
    """Return the keys of the settings file; a file that isn't named may be missing."""
    path = named or DEFAULT_FILE
    if named is None and not path.exists():
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config: {path} is no TOML: {error}") from None
    check_keys(values, str(path), Settings.model_fields)
    return values


def load(flags: Mapping[str, object] | None = None) -> Settings:
    """Return the settings of flags, environment and file; a bad one is a `ConfigError`."""
    variables = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    given = (name for name in os.environ if name.startswith(ENV_PREFIX))
    check_keys(given, "the environment", variables)
    chosen = dict(flags or {})
    check_keys(chosen, "the command line", Settings.model_fields)
    try:
        return Settings.model_validate(chosen)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """Return one sentence for the first problem: the field, what is wrong, where to set it."""
    first = error.errors(include_input=False, include_url=False)[0]
    field = str(first["loc"][0])
    flag = field.replace("_", "-")
    return (
        f"{field}: {first['msg'].lower()}; "
        f"set it with --{flag}, {ENV_PREFIX}{field.upper()} or in {DEFAULT_FILE}"
    )
