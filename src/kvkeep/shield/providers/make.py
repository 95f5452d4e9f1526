"""From a provider's name to the provider; services' clients are imported where they are named."""

from __future__ import annotations

from pathlib import Path

from kvkeep.errors import ConfigError
from kvkeep.shield.providers.local import LocalProvider
from kvkeep.shield.providers.provider import KeyProvider, ProviderSpec
from kvkeep.shield.secret import SecretRegion


def make_provider(spec: ProviderSpec, region: SecretRegion) -> KeyProvider:
    """Return the provider a spec names; raises `ConfigError` where it can't be used."""
    parts = spec.parts
    match spec.kind:
        case "file":
            return LocalProvider.of_file(Path(parts[0]), region)
        case "env":
            return LocalProvider.of_variable(parts[0], region)
        case "fd":
            return LocalProvider.of_descriptor(parts[0], region)
        case "attested":
            from kvkeep.shield.providers.attested import AttestedProvider  # noqa: PLC0415 - slow

            entry = parts[2] if len(parts) > 2 else None
            return AttestedProvider.connect(parts[0], parts[1], entry, region)
        case _:
            return _service(spec)


def _service(spec: ProviderSpec) -> KeyProvider:
    parts = spec.parts
    try:
        match spec.kind:
            case "vault":
                from kvkeep.shield.providers.vault import VaultProvider  # noqa: PLC0415 - an extra

                return VaultProvider.connect(parts[0], parts[1])
            case "kms":
                from kvkeep.shield.providers.kms import KmsProvider  # noqa: PLC0415 - an extra

                return KmsProvider.connect(parts[0])
            case _:
                from kvkeep.shield.providers.pkcs11 import HsmProvider  # noqa: PLC0415 - an extra

                return HsmProvider.connect(*parts)
    except ImportError as error:
        raise ConfigError(
            f"shield_keys: {spec.kind} needs the package {error.name}; install kvkeep[{spec.kind}]"
        ) from None
