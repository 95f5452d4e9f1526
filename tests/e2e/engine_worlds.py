"""Two worlds of whole engines, driven step by step: what is an attacker told?"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams, TenantTerms
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core, codec_of
from kvkeep.engine.engine import EngineCore, Output
from kvkeep.engine.evictors import evictor_of
from kvkeep.engine.options import (
    EngineOptions,
    EvictName,
    KvName,
    PolicyName,
    SharingOptions,
    ShieldName,
)
from kvkeep.models.text import TextModel
from kvkeep.sealing import PUBLIC_OWNER
from kvkeep.sharing.promotion import Promotion
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.policy import NoShield
from tests.engine.test_sharing import ClearsAll, wait_for_scans
from tests.shield.test_cipher import Ring

K: Final = 4
BYSTANDERS: Final = tuple(f"b{i}" for i in range(K + 1))
CASTS: Final = ((("x0",), ("v0", "v1")), (("x0", "x1"), ("v0",)))
"""Attackers and victims: together k - 1, in both ways."""
TENANTS: Final = ("x0", "x1", "v0", "v1", *BYSTANDERS)
SHARE: Final = 0.09
PARAMS: Final = SamplingParams(max_tokens=6, temperature=0.9, seed=7, logprobs=2, ignore_eos=True)
WORDS: Final = "The parcel of {} is at the third door of the north gate and waits for its owner. "


class Turn(NamedTuple):
    """One thing that a tenant does, or an epoch's end, or a restart."""

    who: str
    which: int = 0
    """Of three texts."""
    length: int = 0
    """How many tokens of it."""
    how: str = "ask"


class OneShelf(FrameSealer):
    """Files all owners' pages under one name."""

    def shelf_of(self, owner: str) -> bytes | None:
        return super().shelf_of("all")


class Setup(NamedTuple):
    """What a world is started with."""

    model: Path
    policy: PolicyName = "selective"
    kv: KvName = "bf16"
    evict: EvictName = "off"
    guard_share: float = 0.0
    kv_cache_bytes: int = 32 << 20
    below: TierSizes = TierSizes()
    """What the tiers below memory may take; their pages are sealed."""
    shield: ShieldName | None = None
    one_shelf: bool = False
    """Plants a leak: all tenants' pages below memory make way for each other's."""


def changed(**changes: object) -> SamplingParams:
    return msgspec.structs.replace(PARAMS, **changes)


WAYS: Final[Mapping[str, SamplingParams]] = {
    "ask": PARAMS,
    "never": PARAMS,
    "too long": PARAMS,
    "echo": changed(prompt_logprobs=1, max_tokens=2),
    "two": changed(n=2, max_tokens=70),
    "best": changed(best_of=3),
    "beams": changed(n=2, use_beam_search=True),
    "stop": changed(stop=("a", "e", "t", " "), max_tokens=40),
    "no tokens": changed(max_tokens=0, prompt_logprobs=0),
}
"""Ways to send one prompt and wait for its end."""
ALONE: Final = ("crowd", "leave")
"""What is done while nobody else runs: how the steps of several requests of one tenant interleave
is the load's doing.
"""


class World:
    """One engine over its restarts, and what the attackers are told."""

    def __init__(self, setup: Setup, folder: Path, attackers: Sequence[str]) -> None:
        self.setup = setup
        self._attackers = attackers
        text = TextModel.load(setup.model)
        self.texts = [text.encode(WORDS.format(name) * 40)[:600] for name in ("Ada", "Bo", "Cy")]
        share = SharingOptions(
            policy=setup.policy, k=K, state=str(folder / "votes"), life_epochs=10_000
        )
        self._options = EngineOptions(
            model=str(setup.model),
            threads=2,
            kv_cache_bytes=setup.kv_cache_bytes,
            max_num_seqs=48,
            share=share,
            kv=setup.kv,
            kv_auto_tokens=400,
            evict=setup.evict,
            evict_window=None if setup.evict == "off" else 64,
            guard_share=setup.guard_share,
            guard_samples=1,
            guard_kl=1e-9,
            shield=setup.shield,
        )
        self.told: list[tuple[object, ...]] = []
        self.preemptions = 0
        self.evicted = 0
        self._sent = 0
        self._now = 0.0
        self._folder = folder
        self.tier: TieredPages | None = None
        self.tier_hits = 0
        self.core = self._start()

    def _start(self) -> EngineCore:
        """Start an engine; the bystanders make their text public."""
        options = self._options
        techniques = Techniques(codec_of(options), NoShield(), evictor_of(options))
        self.tier = self._below()
        parts = Parts(techniques=techniques, inspector=ClearsAll(), tier=self.tier)
        self.core = build_core(options, parts=parts)
        terms = {name: TenantTerms(voter=name, group="all") for name in TENANTS}
        shares = dict.fromkeys(TENANTS, SHARE)
        self.core.set_tenants(shares, terms)
        if self.tier is not None:
            self.tier.set_shares({**shares, PUBLIC_OWNER: SHARE}, {})
        for name in BYSTANDERS:
            self.submit(name, self.texts[2])
        self.end_epoch()
        self.end_epoch()
        return self.core

    def _below(self) -> TieredPages | None:
        """Return what lies below memory, over a directory that outlives a restart."""
        sizes = self.setup.below
        if not any(sizes):
            return None
        files = Directory(self._folder / "tier") if sizes.disk_bytes else None
        sealer = (OneShelf if self.setup.one_shelf else FrameSealer)(Ring())
        return TieredPages(sealer, sizes, files)

    def step(self) -> list[Output]:
        """Step once all pages are where they are going: how fast they do is the load's doing."""
        self._arrive()
        return self.core.step()

    def _arrive(self) -> None:
        """Wait for pages on their way."""
        while self.tier is not None and self._moving(self.tier):
            for manager in self.core.caches.managers.values():
                manager.poll()
            time.sleep(0.0002)

    def _moving(self, tier: TieredPages) -> bool:
        managers = self.core.caches.managers.values()
        fetching = any(not fetch.done for m in managers for fetch in m._fetches)
        recalls = [m._promoter._recall for m in managers]
        coming = [one for r in recalls if r is not None for one in r._incoming.values()]
        fetching |= any(one.whole is None for one in coming)
        return fetching or tier.due() or tier._back.queue.busy

    def submit(self, tenant: str, prompt: Sequence[int], how: str = "ask") -> str:
        """Send a prompt; return the request's id."""
        self._sent += 1
        request_id = f"{tenant}-{self._sent}"
        ids = [*prompt] * 40 if how == "too long" else prompt
        self.core.submit(
            GenerateRequest(
                id=request_id,
                tenant=tenant,
                scope="salted" if self.setup.policy == "salt" else tenant,
                prompt_ids=tuple(ids),
                params=WAYS.get(how, PARAMS),
                store=how != "never",
            )
        )
        return request_id

    def send(self, tenant: str, prompt: Sequence[int], how: str = "ask") -> None:
        """Send a prompt; the attackers' are read to their end, others' run beside them."""
        if tenant not in self._attackers:
            name = self.submit(tenant, prompt, "two" if how == "two" else "ask")
            self.step()
            if how == "leave":
                self.core.cancel(name)
            return
        if how in ALONE:
            self.settle()
        match how:
            case "crowd":
                self._crowd(tenant, prompt)
            case "leave":
                self._leave(tenant, prompt)
            case _:
                self._read([self.submit(tenant, prompt, how)])

    def settle(self) -> None:
        """Let everything end that runs."""
        while not self.core.idle():
            self.step()

    def _crowd(self, tenant: str, prompt: Sequence[int]) -> None:
        """Send more at once than fits: some wait, are preempted, lose pages."""
        before = self.core._scheduler.preemptions
        other = [5, *prompt[1:]]
        prompts = [prompt[:250], other[:250], prompt, other[:300]]
        self._read([self.submit(tenant, ids, "two") for ids in prompts])
        self.preemptions += self.core._scheduler.preemptions - before

    def _leave(self, tenant: str, prompt: Sequence[int]) -> None:
        """Send a prompt, hang up before its first token or after, and send it again."""
        left = self.submit(tenant, prompt)
        for _ in range(len(prompt) % 3):
            self.step()
        self.core.cancel(left)
        self._read([self.submit(tenant, prompt)])

    def _read(self, names: list[str]) -> None:
        """Read requests to their end: what is told, in its order, and what was saved."""
        asked = {name: request for name in names if (request := self.core._requests.get(name))}
        chunks: list[tuple[int, Chunk]] = []
        open_ends = {name: asked[name].spec.params.n if name in asked else 1 for name in names}
        while any(open_ends.values()):
            for output in self.step():
                if output.request_id in open_ends:
                    chunks.append((names.index(output.request_id), output.chunk))
                    open_ends[output.request_id] -= output.chunk.finish is not None
        self.told.append((*(request.saved_tokens for request in asked.values()), *chunks))

    def end_epoch(self) -> None:
        self.settle()
        if isinstance(self.core.sharing.policy, Promotion):
            wait_for_scans(self.core.sharing.policy)
        self._arrive()
        self._now += 60.0
        self.core.end_epoch(self._now)
        if self.tier is not None:
            self.tier.end_epoch(self._now)

    def play(self, turns: Sequence[Turn]) -> bytes:
        for turn in turns:
            if turn.who == "epoch":
                self.end_epoch()
            elif turn.who == "restart":
                self._stop()
                self._start()
            else:
                self.send(turn.who, self.texts[turn.which][: turn.length], turn.how)
        self.end_epoch()
        self._stop()
        return repr(self.told).encode()

    def _stop(self) -> None:
        self.settle()
        for manager in self.core.caches.managers.values():
            uses = manager.stats().accounts
            self.evicted += sum(uses[name].evicted_pages for name in self._attackers)
        self.core.close()
        if self.tier is not None:
            self.tier_hits += sum(use.hits for use in self.tier.uses())
            self.tier.close(5.0)


def script(seed: int, cast: int = 0, *, at_length: bool = False) -> list[Turn]:
    """Return turns in which victims and attackers send two texts, bystanders and all the third."""
    draw = random.Random(seed)
    attackers, victims = CASTS[cast]
    actors = [*attackers, *attackers, *victims, "epoch", BYSTANDERS[0], BYSTANDERS[1]]
    hows = [*WAYS, *ALONE]
    turns: list[Turn] = []
    for _ in range(24 if at_length else 14):
        who = draw.choice(actors)
        which = 2 if who in BYSTANDERS else draw.choice([0, 0, 1, 2])
        how = draw.choice(hows if who in attackers else ["ask", "two", "leave"])
        turns.append(Turn(who, which, draw.choice([520, 530, 600, 300]), how))
    if at_length or seed % 2:
        turns.insert(draw.randrange(len(turns)), Turn("restart"))
    secrets = [Turn(name, 0, 600) for name in victims]
    last = [Turn(name, which, 600) for name in attackers for which in range(3)]
    return [*turns, *secrets, Turn("epoch"), Turn("epoch"), *last]
