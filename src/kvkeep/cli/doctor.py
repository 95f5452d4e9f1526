"""`kvkeep doctor`: what a machine can do, if a model can be served, where a template breaks."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Final

import typer

from kvkeep.cli.console import OUT, human_bytes, make_table
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.errors import ModelError

app = new_app("Look at the machine, a model, or a chat template.")

FEATURES: Final = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the processor flags named in the text of /proc/cpuinfo."""
    lines = (line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())


def machine_rows(settings: Settings) -> list[tuple[str, str]]:
    """Return what the engine would find on this machine."""
    from kvkeep import ops

    info = Path("/proc/cpuinfo")
    flags = cpu_flags(info.read_text(encoding="utf-8")) if info.exists() else frozenset()
    cores = len(os.sched_getaffinity(0))
    page = os.sysconf("SC_PAGE_SIZE")
    chosen = ops.select(settings.kernel, settings.threads or cores, settings.device)
    total, free = (os.sysconf(name) * page for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return [
        ("machine", f"{platform.machine()}, {cores} cores"),
        ("features", ", ".join(name for name in FEATURES if name in flags) or "none of ours"),
        ("memory", f"{human_bytes(free)} free of {human_bytes(total)}"),
        ("kernel", chosen.name),
    ]


def hygiene_rows() -> list[tuple[str, str]]:
    """Return what keeps keys and pages out of other hands here."""
    from kvkeep.shield.secret import look

    found = look()
    memory = {
        "memfd_secret": "memfd_secret: no other process reads it, root's included",
        "mlock": "locked, kept out of dumps; root reads it (this kernel has no memfd_secret)",
        "unlocked": "neither secret nor locked: raise RLIMIT_MEMLOCK",
    }
    cores = "none of an engine that seals, nor of its key process"
    if found.core_limit_bytes != 0:
        cores += "; the front end may, with prompts in it: ulimit -c 0"
    return [
        ("key memory", memory[found.key_memory]),
        ("open tiles", _locked(found.locked_bytes)),
        ("core dumps", cores),
        ("swap", "on: pages in memory may reach it; encrypt it" if found.swap else "off"),
        ("attestation", "configfs reports" if found.attestation else "none: no --shield tee"),
    ]


def _locked(most: int | None) -> str:
    """Return how much of what `--shield tile` opens stays out of swap."""
    room = "all" if most is None else f"up to {human_bytes(most)}"
    return f"{room} of what --shield tile opens can be locked (RLIMIT_MEMLOCK)"


def tier_rows(settings: Settings) -> list[tuple[str, str]]:
    """Return where pages would go below memory, and who would wrap the keys that seal them."""
    from kvkeep.cli.engine import key_options
    from kvkeep.engine.lower import room_in, sizes_of
    from kvkeep.engine.sealers import key_state

    rows: list[tuple[str, str]] = []
    folder = sizes_of(settings.tier).directory
    room = None if folder is None else room_in(folder)
    for tier in settings.tier:
        found = tier
        if tier.startswith("disk:") and room is not None:
            found += f": {human_bytes(room.free_bytes)} free"
            found += ", READ-ONLY: nothing new is kept there" if room.read_only else ""
        rows.append(("tier", found))
    if settings.tier or settings.shield_keys is not None:
        rows.append(("sealing keys", key_state(key_options(settings))))
    return rows


def model_verdict(settings: Settings) -> str:
    """Return whether the model can be served, or why not."""
    from kvkeep.models.check import check_directory
    from kvkeep.models.hub import resolve
    from kvkeep.shield.folder import is_sealed

    try:
        path = resolve(settings.model, allow_download=settings.allow_download)
        sealed = "; sealed: an engine needs its key" if is_sealed(path) else ""
        return f"can be served ({check_directory(path)}){sealed}"
    except ModelError as error:
        return f"can't be served: {error}"


@app.callback(invoke_without_command=True)
@with_settings(
    "config",
    "model",
    "allow_download",
    "device",
    "kernel",
    "threads",
    "tier",
    "keys",
    "shield_keys",
    "shield_store",
)
def doctor(settings: Settings, context: typer.Context) -> None:
    """Describe the machine and say whether the model can be served."""
    if context.invoked_subcommand is not None:
        return
    verdict = model_verdict(settings)
    rows = [
        *machine_rows(settings),
        *hygiene_rows(),
        *tier_rows(settings),
        ("model", settings.model),
        ("verdict", verdict),
    ]
    OUT.print(make_table(("what", "found"), rows))
    if not verdict.startswith("can be served"):
        raise typer.Exit(1)


@app.command()
def template(
    path: Annotated[Path, typer.Argument(help="directory with a tokenizer and a chat template")],
) -> None:
    """Render a growing conversation and name the first token where the template breaks reuse."""
    from kvkeep.models.template_check import first_break

    found = first_break(path)
    if found is None:
        OUT.print(f"{path}: every turn goes on where the last one ended")
        return
    OUT.print(
        f"turn {found.turn}: token {found.position} breaks reuse; "
        f"the cache holds {found.was!r}, the next prompt has {found.becomes!r}"
    )
    raise typer.Exit(1)
