"""Values made by a format instead of taken from a list: numbers with check digits, keys, dates.

A maker takes the world's generator and a language and returns a string. Formats are public
standards; the worlds differ in the lists and templates around them and in their seeds.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from typing import Final

Maker = Callable[[random.Random, str], str]

ALNUM: Final = string.ascii_letters + string.digits


def digits(rng: random.Random, count: int) -> str:
    """Return decimal digits, the first of them not zero."""
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(count - 1))


def letters(rng: random.Random, count: int, alphabet: str = ALNUM) -> str:
    """Return random characters."""
    return "".join(rng.choice(alphabet) for _ in range(count))


def luhn(body: str) -> str:
    """Return a number with its Luhn digit appended."""
    doubled = [int(c) * 2 if i % 2 == 0 else int(c) for i, c in enumerate(reversed(body))]
    return body + str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)


def card(rng: random.Random, _lang: str) -> str:
    """Return a payment card number in one of its spellings."""
    number = luhn((rng.choice(("4", "51", "53", "55")) + digits(rng, 14))[:15].ljust(15, "7"))
    joint = rng.choice(("", " ", "-"))
    return joint.join(number[i : i + 4] for i in range(0, 16, 4))


IBANS: Final = {"de": 18, "fr": 23, "es": 20, "it": 23, "en": 18, "uk": 25, "ja": 18, "zh": 18}
IBAN_COUNTRY: Final = {"en": "GB", "uk": "UA", "ja": "DE", "zh": "DE"}


def iban(rng: random.Random, lang: str) -> str:
    """Return an IBAN with valid check digits."""
    country = IBAN_COUNTRY.get(lang, lang.upper())
    body = digits(rng, IBANS[lang])
    if country == "GB":
        body = letters(rng, 4, "ABCLNRSW") + body[:14]
    elif country == "IT":
        body = rng.choice("ABKXZ") + body[:22]
    value = "".join(str(int(c, 36)) for c in f"{body}{country}00")
    whole = f"{country}{98 - int(value) % 97:02d}{body}"
    if rng.random() < 0.5:
        return whole
    return " ".join(whole[i : i + 4] for i in range(0, len(whole), 4))


def _tax_id(rng: random.Random) -> str:
    """Return a German tax id: one digit twice among the first ten, ISO 7064 mod 11,10."""
    chosen = rng.sample(string.digits, 9)
    while chosen[0] == "0":
        chosen = rng.sample(string.digits, 9)
    body = "".join((*chosen, rng.choice(chosen[:8])))
    product = 10
    for c in body:
        total = (int(c) + product) % 10 or 10
        product = 2 * total % 11
    return body + str((11 - product) % 10)


def _nir(rng: random.Random) -> str:
    """Return a French social security number with its key."""
    body = f"{rng.choice('12')}{rng.randint(30, 99)}{rng.randint(1, 12):02d}"
    body += f"{rng.randint(1, 95):02d}{rng.randint(1, 900):03d}{rng.randint(1, 900):03d}"
    parts = (body[0], body[1:3], body[3:5], body[5:7], body[7:10], body[10:13])
    key = f"{97 - int(body) % 97:02d}"
    return f"{body}{key}" if rng.random() < 0.5 else " ".join((*parts, key))


def _dni(rng: random.Random) -> str:
    """Return a Spanish DNI or NIE."""
    table = "TRWAGMYFPDXBNJZSQVHLCKE"
    if rng.random() < 0.3:
        lead, body = rng.choice((("X", 0), ("Y", 1), ("Z", 2))), rng.randint(0, 9_999_999)
        return f"{lead[0]}{body:07d}{table[int(f'{lead[1]}{body:07d}') % 23]}"
    number = rng.randint(10_000_000, 99_999_999)
    return f"{number}{rng.choice(('', '-'))}{table[number % 23]}"


ODD_PLACES: Final = (
    *(1, 0, 5, 7, 9, 13, 15, 17, 19, 21),
    *(1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
)
ODD: Final = dict(zip(string.digits + string.ascii_uppercase, ODD_PLACES))


def _codice(rng: random.Random) -> str:
    """Return an Italian codice fiscale with its check letter."""
    body = letters(rng, 6, "BCDFGLMNPRSTVZ") + f"{rng.randint(30, 99)}"
    body += f"{rng.choice('ABCDEHLMPRST')}{rng.randint(1, 31):02d}"
    body += f"{rng.choice('ABCDEFGHIL')}{rng.randint(100, 999)}"
    even = {c: i for i, c in enumerate(string.digits)} | {
        c: i for i, c in enumerate(string.ascii_uppercase)
    }
    total = sum(ODD[c] if i % 2 == 0 else even[c] for i, c in enumerate(body))
    return body + string.ascii_uppercase[total % 26]


def _my_number(rng: random.Random) -> str:
    """Return a Japanese My Number with its check digit."""
    body = digits(rng, 11)
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(c) * w for c, w in zip(body, weights)) % 11
    whole = body + str(0 if rest <= 1 else 11 - rest)
    joint = rng.choice(("", " ", "-"))
    return joint.join(whole[i : i + 4] for i in range(0, 12, 4))


def _resident(rng: random.Random) -> str:
    """Return a Chinese resident identity number with its check character."""
    area = rng.choice(("110105", "310115", "440304", "510107", "330106", "420111", "320583"))
    body = f"{area}{rng.randint(1940, 2005)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    body += f"{rng.randint(1, 999):03d}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return body + "10X98765432"[sum(int(c) * w for c, w in zip(body, weights)) % 11]


def _rnokpp(rng: random.Random) -> str:
    """Return a Ukrainian taxpayer number with its check digit."""
    body = digits(rng, 9)
    weights = (-1, 5, 7, 9, 4, 6, 10, 5, 7)
    return body + str(sum(int(c) * w for c, w in zip(body, weights)) % 11 % 10)


def _ssn(rng: random.Random) -> str:
    """Return a US social security number or a British NHS number."""
    if rng.random() < 0.6:
        return f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
    while True:
        body = digits(rng, 9)
        rest = 11 - sum(int(c) * w for c, w in zip(body, range(10, 1, -1))) % 11
        if rest != 10:
            whole = body + str(rest % 11)
            return f"{whole[:3]} {whole[3:6]} {whole[6:]}"


NATIONAL: Final[Mapping[str, Callable[[random.Random], str]]] = {
    "en": _ssn,
    "de": _tax_id,
    "fr": _nir,
    "es": _dni,
    "it": _codice,
    "ja": _my_number,
    "zh": _resident,
    "uk": _rnokpp,
}

PHONES: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("(4##) 2##-####", "+1 312-2##-####", "07### ######", "+44 20 7### ####", "617-3##-####"),
    "de": ("+49 151 ########", "0176 ########", "030 #######", "+49 89 ######", "0221/#######"),
    "fr": ("06 ## ## ## ##", "+33 6 ## ## ## ##", "01.4#.##.##.##", "07########"),
    "es": ("6## ## ## ##", "+34 6########", "91 3## ## ##", "6##-###-###"),
    "it": ("+39 347 #######", "333 #######", "02 4#######", "348-#######"),
    "ja": ("090-####-####", "03-3###-####", "080########", "+81 90-####-####", "06-6###-####"),
    "zh": ("138########", "139 #### ####", "010-6#######", "+86 186########", "021-5#######"),
    "uk": ("+380 67 ### ## ##", "050 ### ## ##", "(044) 2##-##-##", "+38063#######", "0971######"),
}

PASSPORTS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("#########", "5########"),
    "de": ("C01X0####", "CF#######", "L01X00T4#"),
    "fr": ("1#AV#####", "2#CK#####"),
    "es": ("PAA######", "XDC######"),
    "it": ("YA#######", "YB#######"),
    "ja": ("TK#######", "TR#######", "MU#######"),
    "zh": ("E########", "EH#######", "G########"),
    "uk": ("FA######", "ET######", "МТ######"),
}

ACCOUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("########", "#########12", "####-####-##"),
    "ja": ("#######", "1######", "00#####"),
    "zh": ("6222##############", "6217 #### #### #### ###", "6228###############"),
}


def mask(rng: random.Random, pattern: str) -> str:
    """Return a pattern with each `#` made a digit."""
    return "".join(str(rng.randint(0, 9)) if c == "#" else c for c in pattern)


def api_key(rng: random.Random, _lang: str) -> str:
    """Return a secret in the shape of a well-known service's key."""
    shapes: tuple[Callable[[], str], ...] = (
        lambda: "AKIA" + letters(rng, 16, string.ascii_uppercase + "234567"),
        lambda: "ghp_" + letters(rng, 36),
        lambda: "sk_live_" + letters(rng, 24),
        lambda: "xoxb-" + digits(rng, 12) + "-" + digits(rng, 12) + "-" + letters(rng, 24),
        lambda: "glpat-" + letters(rng, 20),
        lambda: "AIza" + letters(rng, 35),
        lambda: letters(rng, 40),
        lambda: letters(rng, 32, "0123456789abcdef"),
    )
    return rng.choice(shapes)()


def jwt(rng: random.Random, _lang: str) -> str:
    """Return a signed token."""
    return f"eyJhbGciOiJIUzI1NiJ9.eyJ{letters(rng, 40)}.{letters(rng, 43)}"


def secret_tail(rng: random.Random, _lang: str) -> str:
    """Return the part of a password that no word list holds."""
    shapes = (
        f"{rng.randint(10, 2030)}{rng.choice('!#$%&*')}",
        f"{rng.choice('!_-@')}{rng.randint(1, 999)}{letters(rng, 2)}",
        letters(rng, 5, ALNUM + "!#%&*"),
    )
    return rng.choice(shapes)


def code_hash(rng: random.Random, _lang: str) -> str:
    """Return a hash as a commit, a file or an image has."""
    return letters(rng, rng.choice((7, 12, 40, 64)), "0123456789abcdef")


def uuid(rng: random.Random, _lang: str) -> str:
    """Return an identifier of a resource."""
    return "-".join(letters(rng, n, "0123456789abcdef") for n in (8, 4, 4, 4, 12))


def number(low: int, high: int) -> Maker:
    """Return a maker of whole numbers."""
    return lambda rng, _lang: str(rng.randint(low, high))


def padded(low: int, high: int) -> Maker:
    """Return a maker of two-digit numbers."""
    return lambda rng, _lang: f"{rng.randint(low, high):02d}"


def masked(patterns: Mapping[str, tuple[str, ...]]) -> Maker:
    """Return a maker of numbers by their language's patterns."""
    return lambda rng, lang: mask(rng, rng.choice(patterns.get(lang, patterns["en"])))


POSTCODES: Final = {
    "ja": ("1##-00##", "5##-0###"),
    "zh": ("1000##", "5180##"),
    "en": ("0####", "6####"),
}
FIVE: Final = ("#####",)

SPACELESS: Final = ("ja", "zh")


def spaced(spaced_text: str, spaceless_text: str) -> Maker:
    """Return a maker of one text, or of another in a script without spaces."""
    return lambda _rng, lang: spaceless_text if lang in SPACELESS else spaced_text


def stop(rng: random.Random, lang: str) -> str:
    """Return what ends a sentence, or nothing."""
    if lang in SPACELESS:
        return rng.choice(("。", "。", "。", "", "！"))
    return rng.choice((".", ".", ".", "", "!", "?"))


def colon(rng: random.Random, lang: str) -> str:
    """Return what stands between a form's label and its value."""
    if lang in SPACELESS and rng.random() < 0.7:
        return rng.choice(("：", "：", "　", " "))
    return rng.choice((": ", ": ", ": ", ":", " = ", " - ", "\t", ":  ", " "))


MAKERS: Final[Mapping[str, Maker]] = {
    "sp": spaced(" ", ""),
    "dot": stop,
    "col": colon,
    "br": lambda rng, _lang: rng.choice(("\n", "\n", "\n\n")),
    "card": card,
    "iban": iban,
    "national_id": lambda rng, lang: NATIONAL[lang](rng),
    "phone": masked(PHONES),
    "passport": masked(PASSPORTS),
    "account": masked(ACCOUNTS),
    "api_key": api_key,
    "jwt": jwt,
    "tail": secret_tail,
    "hash": code_hash,
    "uuid": uuid,
    "zip": lambda rng, lang: mask(rng, rng.choice(POSTCODES.get(lang, FIVE))),
    "no": number(1, 180),
    "n": number(2, 99),
    "big": number(100, 99_999),
    "year": number(1998, 2026),
    "born": number(1938, 2008),
    "era": number(2, 63),
    "d": number(1, 28),
    "dd": padded(1, 28),
    "mo": number(1, 12),
    "mm": padded(1, 12),
    "hh": padded(0, 23),
    "mi": padded(0, 59),
    "ver": lambda rng, _lang: ".".join(str(rng.randint(0, 19)) for _ in range(rng.randint(2, 3))),
    "ip": lambda rng, _lang: mask(rng, f"10.#.1{rng.randint(0, 9)}#.2#"),
    "digits6": lambda rng, _lang: digits(rng, 6),
    "digits8": lambda rng, _lang: digits(rng, 8),
}
