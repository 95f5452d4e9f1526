"""`kvkeep generate PROMPT`: complete one prompt and end."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from kvkeep.cli.engine import MODEL_SETTINGS, checkpoint_path, running_engine
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.engine.api import EngineClient, FinishReason, GenerateRequest, SamplingParams
from kvkeep.errors import EngineError

app = new_app("Complete one prompt and end.")

LOCAL = "local"
"""The one tenant of a command that serves nobody else."""


async def stream(client: EngineClient, prompt_ids: tuple[int, ...], params: SamplingParams) -> str:
    """Print a completion as it comes and return its text."""
    request = GenerateRequest(
        id="cli", tenant=LOCAL, scope=LOCAL, prompt_ids=prompt_ids, params=params
    )
    text = ""
    async for chunk in client.submit(request):
        if chunk.finish is FinishReason.ERROR:
            raise EngineError(chunk.error or "the engine gave up without a reason")
        text += chunk.text
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return text


async def _generate(settings: Settings, prompt: str, params: SamplingParams) -> None:
    path = checkpoint_path(settings)
    from kvkeep.models.text import TextModel  # a second of imports: after what may be refused

    text = TextModel.load(path)
    ids = tuple(text.encode(prompt))
    async with running_engine(settings) as (client, _):
        await client.set_tenants({LOCAL: 1.0})
        await stream(client, ids, params)


@app.command()
@with_settings(*MODEL_SETTINGS, "seed")
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="text to go on from; - reads stdin")],
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
) -> None:
    """Complete one prompt and end."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=settings.seed
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    asyncio.run(_generate(settings, text, params))
