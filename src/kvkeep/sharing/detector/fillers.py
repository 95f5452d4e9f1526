"""What stands where a name or a value belongs and is none: offices, samples, types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_NOBODY: Final = frozenset(
    [
        "sir",
        "madam",
        "all",
        "world",
        "team",
        "customer",
        "customers",
        "everyone",
        "everybody",
        "neighbours",
        "neighbors",
        "tenants",
        "parents",
        "students",
        "passengers",
        "members",
        "guests",
        "readers",
        "applicants",
        "patients",
        "nachbarn",
        "mieter",
        "eltern",
        "mitglieder",
        "gäste",
        "fahrgäste",
        "patienten",
        "voisins",
        "locataires",
        "élèves",
        "abonnés",
        "vecinos",
        "inquilinos",
        "padres",
        "alumnos",
        "socios",
        "vicini",
        "inquilini",
        "genitori",
        "soci",
        "lettori",
        "condomini",
        "сусіди",
        "мешканці",
        "батьки",
        "читачі",
        "пасажири",
        "пацієнти",
        "colleagues",
        "friends",
        "support",
        "president",
        "speaker",
        "chairman",
        "chairwoman",
        "minister",
        "ambassador",
        "secretary",
        "board",
        "committee",
        "user",
        "name",
        "guest",
        "client",
        "someone",
        "anyone",
        "test",
        "foo",
        "example",
        "sample",
        "präsident",
        "präsidentin",
        "vorsitzender",
        "vorsitzende",
        "ministerin",
        "kanzler",
        "kanzlerin",
        "bürgermeister",
        "kunde",
        "kundin",
        "kunden",
        "vorstand",
        "zusammen",
        "président",
        "présidente",
        "ministre",
        "directeur",
        "directrice",
        "maire",
        "tous",
        "toutes",
        "presidente",
        "ministro",
        "ministra",
        "director",
        "directora",
        "alcalde",
        "todos",
        "todas",
        "cliente",
        "direttore",
        "sindaco",
        "tutti",
        "ministri",
        "equipo",
        "equipe",
        "squadra",
        "mundo",
        "mondo",
        "monde",
        "ihr",
        "ihre",
        "votre",
        "vostra",
        "kundendienst",
        "your",
        "our",
        "unser",
        "mein",
        "my",
        "this",
        "that",
        "here",
        "there",
        "thank",
        "пане",
        "пані",
        "клієнте",
        "друзі",
        "колеги",
        "голово",
        "усіх",
        "всіх",
        "правління",
        "null",
        "none",
        "true",
        "false",
    ]
)
_UNFILLED: Final = frozenset(
    [
        "string",
        "str",
        "text",
        "none",
        "null",
        "nil",
        "true",
        "false",
        "undefined",
        "type",
        "object",
        "array",
        "list",
        "dict",
        "optional",
        "required",
        "unknown",
        "example",
        "todo",
        "tbd",
        "n/a",
        "na",
        "empty",
        "field",
        "name",
        "value",
        "see",
        "the",
        "a",
        "an",
        "of",
        "if",
    ]
)
_SAMPLES: Final = frozenset(
    [
        "john doe",
        "jane doe",
        "jane roe",
        "john q. public",
        "john smith",
        "jane smith",
        "some user",
        "your name",
        "full name",
        "example person",
        "jane example",
        "test customer",
        "test user",
        "foo bar",
        "joe bloggs",
        "max mustermann",
        "erika mustermann",
        "erika musterfrau",
        "max muster",
        "jean dupont",
        "mario rossi",
        "mario bianchi",
        "juan pérez",
        "juan perez",
        "山田太郎",
        "山田 太郎",
        "山田花子",
        "佐藤次郎",
        "佐藤 次郎",
        "鈴木一郎",
        "鈴木 一郎",
        "张三",
        "李四",
        "王五",
        "王小明",
        "іван іваненко",
        "петро петренко",
        "тест тестенко",
    ]
)


_OFFICES: Final = frozenset(
    [
        *("chancellor", "governor", "mayoress", "senator", "councillor", "headteacher"),
        *("headmaster", "principal", "rector", "commissioner", "inspector", "consul", "delegates"),
        *("landrat", "landrätin", "bürgermeisterin", "oberbürgermeister", "oberbürgermeisterin"),
        *("senatorin", "staatssekretär", "staatssekretärin", "direktorin", "rektor", "rektorin"),
        *("botschafter", "botschafterin", "schulleiter", "schulleiterin", "intendant"),
        *("intendantin", "abgeordnete", "abgeordneter", "pfarrer", "préfet", "préfète"),
        *("sénateur", "sénatrice", "député", "députée", "recteur", "ambassadeur", "ambassadrice"),
        *("conseillers", "conseiller", "conseillère", "proviseur", "chancelier", "alcaldesa"),
        *("gobernador", "gobernadora", "senadora", "senador", "diputado", "diputada", "rector"),
        *("rectora", "embajador", "embajadora", "secretario", "secretaria", "consejero"),
        *("consejera", "concejal", "vicepresidente", "vicepresidenta", "sindaca", "prefetto"),
        *("prefetta", "senatore", "senatrice", "deputato", "deputata", "rettore", "rettrice"),
        *("ambasciatore", "ambasciatrice", "segretario", "segretaria", "assessore", "assessora"),
        *("міністре", "президенте", "ректоре", "директоре", "директорко", "депутати", "депутате"),
        *("посол", "после", "начальник", "начальнику", "начальниця", "чергова", "черговий"),
        *("голова", "мере", "секретарю", "редакторе", "суддя"),
    ]
)
"""More offices; beside a title they name nobody."""
_TITLES: Final = frozenset(
    [
        *("mr", "mrs", "ms", "miss", "mx", "dr", "prof", "sr", "sra", "srta", "sig", "sig.ra"),
        *("dott", "dott.ssa", "mme", "mlle", "herr", "herrn", "frau", "st", "and", "und", "et"),
        *("y", "e", "та", "і", "й", "or", "oder", "ou", "o", "або", "&", "пан"),
    ]
)
"""Titles, and what joins names."""
_BEFORE: Final = frozenset(
    [
        *("the", "das", "der", "die", "la", "le", "el", "il", "los", "les", "gli"),
        *("professor", "doktor", "direktor", "monsieur", "madame", "señor", "señora", "signora"),
        *("signore", "signor", "señoría", "señorías", "onorevole", "onorevoli", "judge"),
        *("先生", "女士"),
    ]
)
"""Articles and titles: they stand before a name, and articles end some; alone they are none."""


_FORM_STREET = re.compile(
    r"\b1,? rue de la paix|rue de la paix, 75000|via roma,? ?1(?![0-9])|calle mayor,? ?1(?![0-9])"
)
_SAMPLE_NAME = re.compile(
    r"(?i)[ \t]{0,2}\b"
    r"(?:ex[ae]mple|sample|mustermann|musterfrau|beispiel|ejemplo|esempio|приклад)\b"
)
_REACH: Final = 24
"""Characters by which what a form shows may be longer than what was taken for an address."""
_YEARS = re.compile(r"^[^0-9]+(?:19|20)[0-9]{2}\b[^0-9]*$")
_FORM_PLACE = re.compile(r"(?:12345|54321|75000|00100|([019])\1{4}) \w")
"""Streets and postal codes that forms show in French, Italian, Spanish and German."""
_CODE = re.compile(r"(?:self|this|row|data|user|request|form|values?|record|item|params|obj)\.\w")
"""How an expression of a program begins."""


_OBJECT: Final = "を"
"""The mark of an object: what a sentence says of somebody, and part of no name."""
_NOONE: Final = _NOBODY | _OFFICES
_FORMS: Final = _BEFORE | _NOBODY | _OFFICES | _TITLES | {""}


def person(value: str) -> bool:
    """Tell whether a name is neither an office, a form of address nor a form's sample."""
    words = value.casefold().split()
    while words and words[0] in _BEFORE:
        words = words[1:]
    while len(words) > 1 and words[-1] in _BEFORE:
        words = words[:-1]
    if _OBJECT in value or not words or not {words[0], words[-1]}.isdisjoint(_NOONE):
        return False
    return not _sample(words)


def _sample(words: Sequence[str]) -> bool:
    return " ".join(words) in _SAMPLES


def somebody(value: str) -> bool:
    """Tell whether anything but offices, forms of address and a form's samples is in a name."""
    words = [word.strip(".,:;()«»\"'") for word in value.casefold().split()]
    return not all(word in _FORMS for word in words) and not _sample(words)


_SAMPLE_SECRETS: Final = frozenset(
    [
        *("password", "passwd", "pass", "pwd", "secret", "changeme", "example", "your_password"),
        *("yourpassword", "mypassword", "postgres", "passwort", "contraseña"),
    ]
)


def own_secret(value: str) -> bool:
    """Tell whether a password in an address is none of the words that documentation puts there."""
    return value.casefold() not in _SAMPLE_SECRETS


def filled(value: str) -> bool:
    """Tell whether a field holds more than a type, a program's word or the absence of a value."""
    return value.casefold().split()[0] not in _UNFILLED and not _CODE.match(value)


def form_name(text: str, start: int, end: int) -> bool:
    """Tell whether a span of a text is the name of a form's sample, or the first half of one."""
    behind = _SAMPLE_NAME.match(text, end)
    return behind is not None or _SAMPLE_NAME.search(text, start, end) is not None


def form_street(text: str, start: int, end: int) -> bool:
    """Tell whether a span of a text touches a street that forms show."""
    begin = max(0, start - _REACH)
    found = _FORM_STREET.finditer(text[begin : end + _REACH].lower())
    return any(at.start() + begin < end and at.end() + begin > start for at in found)


def _shown(word: str) -> bool:
    return _FORM_STREET.search(word) is not None or _FORM_PLACE.match(word) is not None


def _told(value: str) -> bool:
    """Tell whether a sentence about a street was taken for one: words in small letters, a year."""
    return _YEARS.search(value) is not None and not any(map(str.isupper, value[1:]))


def real_place(value: str) -> bool:
    """Tell whether an address is none of those that forms show as an example."""
    word = value.lower()
    fillers = ("example", "sample", "muster", "placeholder", "exemple", "ejemplo", "esempio")
    known = (
        "123 main",
        "1 main st",
        "10 downing",
        "1600 pennsyl",
        "anytown",
        "calle falsa",
        "прикладн",
    )
    return not any(part in word for part in (*fillers, *known)) and not (
        _shown(word) or _told(value)
    )
