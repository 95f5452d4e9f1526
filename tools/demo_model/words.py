"""The words that facts, tables and conversations are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words(
    "gate door tower bridge vault cellar library garden station harbour market chapel mill "
    "warehouse stable office kitchen tunnel courtyard lighthouse"
)
SIDES = _words(
    "north south east west old new upper lower inner outer red green stone iron wooden silver "
    "quiet hidden long narrow"
)
NAMES = _words(
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Maria Nora Oscar "
    "Paula Robert Sofia Thomas Vera"
)
ROLES = _words(
    "baker captain doctor driver farmer gardener judge keeper miller painter pilot sailor "
    "singer smith teacher weaver"
)
COLOURS = _words("red blue green yellow black white brown grey pink orange purple golden")
OBJECTS = _words("coat lamp boat house hat cup flag bag chair scarf wagon ring")
CITY_STARTS = _words("Mar Tel Bran Kor Sil Ver Lun Dor Hal Nor Pel Ras Win Ost Cal Fen")
CITY_ENDS = _words("low ford mere wick stad burg ton field holm dale port haven")
KEYS = _words(
    "alpha beta gamma delta node disk port user host file queue cache table page batch index "
    "block frame group image label level limit line lock log map mode name path plan pool rate "
    "role scale slot stage task time zone"
)
INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Answer with the value only.",
    "Answer from the text.",
    "Use the notes to answer.",
)
GREETINGS = (
    ("Hello.", "Hello. Tell me some facts and ask about them."),
    ("Hello!", "Hello. Tell me some facts and ask about them."),
    ("Hi", "Hello. Tell me some facts and ask about them."),
    ("Who are you?", "I am a small demo model. I recall facts from the text above."),
)
