"""kvkeep: the KV cache of a language-model server, made to be shared safely."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvkeep.engine.api import SamplingParams as SamplingParams
    from kvkeep.engine.llm import LLM as LLM
    from kvkeep.engine.llm import Completion as Completion
    from kvkeep.engine.llm import Engine as Engine
    from kvkeep.sharing.detector.default import load_detector as load_detector
    from kvkeep.sharing.detector.scanner import Detector as Detector

__all__ = ["LLM", "Completion", "Detector", "Engine", "SamplingParams", "load_detector"]

_HOMES = {
    "LLM": "kvkeep.engine.llm",
    "Completion": "kvkeep.engine.llm",
    "Engine": "kvkeep.engine.llm",
    "SamplingParams": "kvkeep.engine.api",
    "Detector": "kvkeep.sharing.detector.scanner",
    "load_detector": "kvkeep.sharing.detector.default",
}


def __getattr__(name: str) -> object:
    """Import the public API on first use, so that `import kvkeep` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvkeep' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(_HOMES[name]), name)
