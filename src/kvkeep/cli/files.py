"""Files that a command line names."""

from __future__ import annotations

from pathlib import Path

from kvkeep.errors import ConfigError


def read_text(path: Path) -> str:
    """Return a text file's content; raises `ConfigError` where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text: can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"text: {path} is not UTF-8; convert it") from None
