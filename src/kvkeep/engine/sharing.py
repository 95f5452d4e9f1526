"""The sharing policy an engine runs with, and what belongs to it: members, votes, alerts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvkeep.cache.accounts import Retention
from kvkeep.engine.api import GenerateRequest, SharingStats, TenantTerms
from kvkeep.engine.gate import TtftGate
from kvkeep.engine.options import SharingOptions
from kvkeep.engine.terms import VOTING, leaving, limits_of, members_of, rule_of, store_of
from kvkeep.errors import ConfigError
from kvkeep.sharing.audit import AlertSink, AuditLog, NoSink, Webhook
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.organisation import OrganisationFile
from kvkeep.sharing.detector.spans import Recogniser
from kvkeep.sharing.inspection import ClearsNothing, DecodeText, Detects, Inspector
from kvkeep.sharing.ledger import Ballot
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.monitor import Monitor
from kvkeep.sharing.pins import Pins
from kvkeep.sharing.policies.isolate import ShareNothing
from kvkeep.sharing.policies.pinned import SharePinned
from kvkeep.sharing.policies.safekv import SafeKV
from kvkeep.sharing.policies.salt import ShareBySalt
from kvkeep.sharing.policies.share_all import ShareAll
from kvkeep.sharing.promotion import Promotion, PromotionParts
from kvkeep.types import EpochDelta, SharingPolicy

log = logging.getLogger(__name__)

_READ = (*VOTING, "safekv")
"""Policies that share what tenants send, so that it has to be read first."""


def rules_of(options: SharingOptions) -> OrganisationFile | None:
    """Return the organisation's rules; raises `ConfigError` for a bad file, or a needless one."""
    if options.rules is None:
        return None
    _check_read("share_rules", options)
    try:
        return OrganisationFile(Path(options.rules))
    except ConfigError as error:
        raise ConfigError(f"share_rules: {error}") from None


def inspector_of(options: SharingOptions, rules: OrganisationFile | None = None) -> Inspector:
    """Return what reads prompts before they are shared: the shipped detector where it is needed."""
    more: list[Recogniser] = []
    if options.classifier is not None:
        _check_read("share_classifier", options)
        from kvkeep.models.classifier import load_recogniser  # noqa: PLC0415 - slow to import

        more.append(load_recogniser(Path(options.classifier)))
    if options.policy not in _READ:
        return ClearsNothing()
    return Detects(load_detector(rules, more=more))


def _check_read(field: str, options: SharingOptions) -> None:
    if options.policy not in _READ:
        raise ConfigError(
            f"{field}: {options.policy!r} reads no prompts; leave it out, or share 'selective'"
        )


class EpochTimer:
    """Says when the engine's loop must end an epoch."""

    def __init__(
        self, epoch_s: float, clock: Callable[[], float] = time.monotonic, *, led: bool = False
    ) -> None:
        """`led`: somebody else says so."""
        self._led = led
        self._epoch_s = epoch_s
        self._clock = clock
        self._end = clock() + epoch_s

    def left_s(self) -> float:
        """Return the seconds until the epoch's end, at least 0."""
        return self._epoch_s if self._led else max(0.0, self._end - self._clock())

    def due(self) -> bool:
        """Tell, once an epoch, that it has ended; epochs that were slept through count as one."""
        now = self._clock()
        if self._led or now < self._end:
            return False
        self._end += self._epoch_s * (1 + (now - self._end) // self._epoch_s)
        return True


class Sharing:
    """A policy and its surroundings, as the engine drives them."""

    def __init__(
        self,
        options: SharingOptions,
        decode: DecodeText,
        policy: SharingPolicy | None = None,
        inspector: Inspector | None = None,
        rules: OrganisationFile | None = None,
    ) -> None:
        """`policy` takes the place of the one the options name; `rules` are the inspector's."""
        self.epoch_s = options.epoch_s
        self.led = options.led
        self.pins = Pins()
        self.directory = Directory()
        self._options = options
        self._decode = decode
        self._inspector = inspector or ClearsNothing()
        self._rules = rules
        self._webhook = Webhook(options.webhook) if options.webhook else None
        self._audit = (
            AuditLog(Path(options.audit_log), self._webhook or NoSink())
            if options.audit_log
            else None
        )
        if self._audit is not None:
            self._audit.prepare()
        sink: AlertSink = self._audit or self._webhook or NoSink()
        self._monitor = Monitor(sink=sink)
        self._terms: dict[str, TenantTerms] = {}
        self._members: dict[str, Member] = {}
        self.policy = policy or self._named()
        self.gate = TtftGate(self._consumes, options.epoch_s) if options.gate else None

    def leaving(self, terms: Mapping[str, TenantTerms]) -> list[str]:
        """Return the accounts whose votes must not count under new terms."""
        return leaving(self._members, members_of(terms))

    def settle(self, terms: Mapping[str, TenantTerms]) -> None:
        """Take the terms of all accounts; ask `leaving` first."""
        self._terms, self._members = dict(terms), members_of(terms)
        self.directory.set(self._members)

    def retention(self) -> dict[str, Retention]:
        """Return how long each account's pages may stay."""
        return {
            account: Retention(term.ttl_s, term.store != "never", term.store == "disk")
            for account, term in self._terms.items()
        }

    def stores_nothing(self, account: str) -> bool:
        """Tell whether nothing of an account may stay cached."""
        term = self._terms.get(account)
        return term is not None and term.store == "never"

    def may_code(self, account: str) -> bool:
        """Tell whether an account's pages may be coded, where an engine can choose."""
        term = self._terms.get(account)
        return term is None or term.coded

    def may_evict(self, spec: GenerateRequest) -> bool:
        """Tell whether tokens of a request may be evicted: by its own word and its account's."""
        term = self._terms.get(spec.tenant)
        return spec.evict and (term is None or term.evict)

    def reads(self, account: str) -> bool:
        """Tell whether an account may be served what others sent, without being told."""
        return isinstance(self.policy, Promotion) and self._consumes(account)

    def _consumes(self, account: str) -> bool:
        return self.directory.consumer(account) is not None

    def stats(self, public_pages: int, saved_tokens: int, max_tokens: int) -> SharingStats:
        """Return the figures for the admin port; prompts have at most `max_tokens`."""
        alerts = tuple((*key, count) for key, count in sorted(self._monitor.alerts.items()))
        failed = sum(
            sink.counts.failed + sink.counts.dropped
            for sink in (self._audit, self._webhook)
            if sink is not None
        )
        if not isinstance(self.policy, Promotion):
            return SharingStats(
                policy=self._options.policy,
                public_pages=public_pages,
                alerts=alerts,
                alerts_failed=failed,
            )
        counts = self.policy.scans.counts
        return SharingStats(
            policy=self._options.policy,
            epoch=self.policy.epoch,
            public_units=self.policy.public_units,
            public_pages=public_pages,
            eps_per_day=self.policy.eps_per_day,
            scanned_bytes=tuple(sorted(counts.scanned_bytes.items())),
            scans_dropped=tuple(sorted(counts.dropped.items())),
            scans_doubtful=tuple(sorted(counts.doubtful.items())),
            scan_restarts=counts.restarts,
            scan_s=counts.seconds,
            saved_tokens=saved_tokens,
            gate_bits=0.0 if self.gate is None else self.gate.bits(max_tokens),
            alerts=alerts,
            alerts_failed=failed,
        )

    def end_epoch(self, now: float) -> None:
        """Take the organisation's rules if they changed, and end the gate's epoch at `now`."""
        if self.gate is not None:
            self.gate.end_epoch(now)
        if self._rules is None:
            return
        known = self._rules.problem
        self._rules.reload()
        if self._rules.problem not in (None, known):
            log.warning("share_rules: %s; the rules in force stay", self._rules.problem)

    def close_epoch(self, epoch: int) -> tuple[list[Ballot], str]:
        """Return the ballots for whoever counts them, and the version of what cleared them."""
        if not isinstance(self.policy, Promotion):
            return [], ""
        return self.policy.close_epoch(epoch), self.policy.version

    def publish(self, state: bytes) -> EpochDelta:
        """Make public what was counted elsewhere."""
        if not isinstance(self.policy, Promotion):
            return EpochDelta(0)
        return self.policy.publish(state)

    def close(self) -> None:
        """End the scanning thread."""
        if isinstance(self.policy, Promotion):
            self.policy.close()

    def _named(self) -> SharingPolicy:
        options = self._options
        match options.policy:
            case "isolate":
                return ShareNothing()
            case "pinned":
                return SharePinned(self.pins)
            case "salt":
                return ShareBySalt()
            case "share_all":
                return ShareAll()
            case "safekv":
                return SafeKV(self.directory, self._decode, self._inspector)
            case "selective" | "dp":
                return self._promotion()

    def _promotion(self) -> Promotion:
        options = self._options
        parts = PromotionParts(
            rule_of(options),
            self.directory,
            self._decode,
            self._inspector,
            store_of(options),
            self._monitor,
            self.pins,
        )
        return Promotion(parts, limits_of(options), threaded=True)
