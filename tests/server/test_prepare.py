"""What of a chat may never be evicted."""

from __future__ import annotations

import msgspec
import pytest

from kvkeep.server.identity import Identity
from kvkeep.server.options import ServerOptions
from kvkeep.server.prepare import Context, prepare_chat
from tests.server.fakes import MODEL, ByteText, info


def context(evict: str) -> Context:
    return Context(
        id="1",
        identity=Identity("acme", "k", 1, evict=False),
        scope_key=b"s" * 32,
        text=ByteText(),
        info=msgspec.structs.replace(info(), evict=evict),
        names=(MODEL,),
        options=ServerOptions(),
    )


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("evict", "first", "tokens"),
    [
        ("corm", SYSTEM, 1 + len("<system>be kind\n")),
        ("off", SYSTEM, 0),
        ("corm", {"role": "user", "content": "be kind"}, 0),
        ("corm", {"role": "system", "content": "refuse me"}, 0),
    ],
)
def test_a_chats_system_prompt_is_protected(evict: str, first: dict[str, str], tokens: int) -> None:
    body = {"model": MODEL, "messages": [first, {"role": "user", "content": "hello"}]}
    (request,) = prepare_chat(context(evict), msgspec.json.encode(body)).requests
    assert request.protected == (((0, tokens),) if tokens else ())
    assert not request.evict
