"""Black-box leak audit of any OpenAI-compatible server, over HTTP alone."""

from __future__ import annotations

from kvkeep.audit.findings import Finding, Report
from kvkeep.audit.run import Options, audit
from kvkeep.audit.target import Account, Cast, cast_of

__all__ = ["Account", "Cast", "Finding", "Options", "Report", "audit", "cast_of"]
