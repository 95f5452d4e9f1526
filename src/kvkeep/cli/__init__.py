"""The `kvkeep` command: imports one subcommand alone and turns errors into one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from typing import Final

from kvkeep.errors import KvkeepError

COMMANDS: Final = {
    "serve": "serve a model to several tenants over the OpenAI API",
    "chat": "talk to a running server, or to a model in this process",
    "generate": "complete one prompt and end",
    "bench": "run a benchmark (from a checkout)",
    "simulate": "plan a cluster on paper, from measured costs of steps",
    "attack": "test a server for leaks between tenants",
    "attack-cache": "see which tokens stolen pages give away",
    "doctor": "look at the machine, a model, or a chat template",
    "tenant": "add, revoke, rotate and list tenants' keys",
    "keys": "make, rotate and look at the keys that seal pages below memory",
    "detect": "find what in a text must stay private",
    "model": "make, seal, describe or calibrate a checkpoint",
    "inspect": "draw what a codec does to a prompt's pages, or write what lies there",
}


def usage() -> str:
    """Return the top-level help."""
    rows = (f"  {name:<12} {line}" for name, line in COMMANDS.items())
    return "\n".join(
        [
            "Usage: kvkeep COMMAND [OPTIONS]",
            "",
            "The KV cache of a language-model server, made to be shared safely.",
            "",
            "Commands:",
            *rows,
            "",
            "`kvkeep COMMAND --help` lists a command's options; every setting is also a KVKEEP_*",
            "variable and a key of kvkeep.toml.",
        ]
    )


def fail(sentence: str, code: int = 1) -> int:
    """Print one sentence on stderr and return the exit code."""
    print(f"kvkeep: {sentence}", file=sys.stderr)  # noqa: T201 - the command line's own output
    return code


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    if not arguments or arguments[0] in {"--help", "-h", "help"}:
        print(usage())  # noqa: T201 - the command line's own output
        return 0
    if arguments[0] == "--version":
        print(version("kvkeep"))  # noqa: T201 - the command line's own output
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return fail(f"no command {name!r}; there are {', '.join(COMMANDS)}", code=2)
    app = importlib.import_module(f"kvkeep.cli.{name.replace('-', '_')}").app
    try:
        app(rest, prog_name=f"kvkeep {name}")
    except KvkeepError as error:
        return fail(str(error))
    except MemoryError:
        return fail("not enough memory; lower --kv-cache-memory-bytes or use a smaller model")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    """Be the `kvkeep` program."""
    sys.exit(run(sys.argv[1:]))
