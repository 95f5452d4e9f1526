"""Check digits: what tells an identifier from a number that only looks like one.

A check takes the matched text, separators included, and says whether it can be genuine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import phonenumbers
from stdnum import iban as stdnum_iban
from stdnum.iso7064 import mod_11_2

from kvkeep.sharing.detector.fillers import filled, own_secret, person, real_place

Check = Callable[[str], bool]

_STDNUM: Final = (
    "bic",
    "imei",
    "cn.uscc",
    "de.idnr",
    "de.vat",
    "es.cif",
    "es.dni",
    "es.nie",
    "eu.vat",
    "fr.nir",
    "fr.siren",
    "fr.siret",
    "fr.tva",
    "gb.nhs",
    "gb.vat",
    "it.codicefiscale",
    "it.iva",
    "ua.edrpou",
    "ua.rntrc",
    "us.ssn",
    "us.itin",
    "us.rtn",
)
"""Formats whose check digits python-stdnum knows, by its module's name."""

AMERICAN: Final = 11
"""Digits of a number of country code 1, that code included."""
_REGIONS: Final = ("US", "GB", "DE", "AT", "CH", "FR", "ES", "IT", "JP", "CN", "UA")


_SEPARATORS: Final = str.maketrans("", "", " .-\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}")


_DATE = re.compile(r"[0-3]?[0-9]([./-])[01]?[0-9]\1(?:19|20)[0-9]{2}")
_HOST = re.compile(r"@?[\w.-]+:[0-9]{2,5}(?:/[\w-]*)?")
"""A host, its port and a path, as they end an address."""
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*[\[(]")
"""How a value that code computes begins."""


_RESERVED: Final = frozenset(
    {"example", "invalid", "test", "localhost", "local"}
    | {"service", "socket", "target", "timer", "mount", "automount", "slice", "device", "scope"}
)
"""Last parts of names that no domain has: RFC 2606, and the units of systemd, `name@id.service`."""


def _digits(value: str) -> list[int]:
    return [ord(letter) - 48 for letter in value if "0" <= letter <= "9"]


@cache
def _known(name: str) -> Check:
    """Return python-stdnum's check of a format, its module read when it is first asked for."""
    check: Check = import_module(f"stdnum.{name}").is_valid
    return check


def _stdnum(name: str, value: str) -> bool:
    return bool(_known(name)(value.translate(_SEPARATORS)))


def luhn(value: str) -> bool:
    """Tell whether the last digit of a number is right: ISO/IEC 7812-1, annex B."""
    return _luhn(_digits(value))


def _luhn(digits: list[int]) -> bool:
    doubled = sum(2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return bool(digits) and (sum(digits[-1::-2]) + doubled) % 10 == 0


def _phone(region: str, value: str) -> bool:
    if not placed(value) or _DATE.fullmatch(value):
        return False
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(value, region))
    except phonenumbers.NumberParseException:
        return False


def possible_phone(value: str) -> bool:
    """Tell whether an international number has a country and a length that exist there."""
    if not placed(value) or [c for c in value if not c.isdigit()] == ["+", "."]:
        return False
    if value.startswith("+1") and len(_digits(value)) < AMERICAN:
        return False  # before the library, which takes many times as long to say so
    try:
        number = phonenumbers.parse(value, None)
    except phonenumbers.NumberParseException:
        return False
    reason = phonenumbers.is_possible_number_with_reason(number)
    return reason == phonenumbers.ValidationResult.IS_POSSIBLE


def _one_digit(digits: list[int]) -> bool:
    """Tell whether all digits are the same, as in a placeholder."""
    return len(set(digits)) < 2


def card(value: str) -> bool:
    """Tell whether a payment card may carry the number: issuer's prefix, length, Luhn."""
    digits = _digits(value)
    if _one_digit(digits) or not _luhn(digits):
        return False
    two, three, four = (int("".join(map(str, digits[:n]))) for n in (2, 3, 4))
    length = len(digits)
    if two in {34, 37}:
        return length == 15
    if three in range(300, 306) or two in {36, 38, 39}:
        return length == 14
    if digits[0] == 4:
        return length in {13, 16, 19}
    mastercard = two in range(51, 56) or four in range(2221, 2721)
    others = two in {35, 62, 65, 81} or four == 6011 or three in range(644, 650)
    domestic = two in {50, 56, 57, 58, 63, 67} or four in range(2200, 2205)
    return ((mastercard or others) and length == 16) or (domestic and length in range(16, 20))


def iban(value: str) -> bool:
    """Tell whether the remainder of an account number is right, whatever its country says."""
    plain = "".join(filter(str.isalnum, value))
    moved = f"{plain[4:]}{plain[:4]}"
    if (
        moved
        and moved.isascii()
        and int("".join(str(int(letter, 36)) for letter in moved)) % 97 != 1
    ):
        return False  # before the library, which takes ten times as long to say so
    return bool(stdnum_iban.is_valid(value, check_country=False))


def resident_id(value: str) -> bool:
    """Tell whether the last character of a Chinese resident number is right."""
    return bool(mod_11_2.is_valid(value.replace(" ", "").upper()))


def my_number(value: str) -> bool:
    """Tell whether the twelfth digit of an individual number is right.

    Source: ministerial ordinance No. 85 of 2014, article 5.
    """
    digits = _digits(value)
    if len(digits) != 12 or _one_digit(digits):
        return False
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(w * d for w, d in zip(weights, digits[:11])) % 11
    return digits[11] == (0 if rest <= 1 else 11 - rest)


def corporate_number(value: str) -> bool:
    """Tell whether a Japanese corporate number is valid, an invoice's T before it or not."""
    return _stdnum("jp.cn", value.removeprefix("T"))


def steuer_id(value: str) -> bool:
    """Tell whether a German tax id is valid and no placeholder."""
    return not _one_digit(_digits(value)) and _stdnum("de.idnr", value)


def rvnr(value: str) -> bool:
    """Tell whether the check digit of a German pension insurance number is right.

    Source: Verordnung ueber die Versicherungsnummer, paragraph 4.
    """
    text = "".join(value.split()).upper()
    plain = text[:8] + f"{ord(text[8]) - 64:02d}" + text[9:]
    weights = (2, 1, 2, 5, 7, 1, 2, 1, 2, 1, 2, 1)
    total = sum(sum(divmod(w * int(d), 10)) for w, d in zip(weights, plain[:12]))
    return total % 10 == int(plain[12])


def kvnr(value: str) -> bool:
    """Tell whether the check digit of a German health insurance number is right.

    Source: GKV-Spitzenverband, structure of the Krankenversichertennummer.
    """
    plain = f"{ord(value[0].upper()) - 64:02d}{value[1:]}"
    products = (int(d) * (1 + i % 2) for i, d in enumerate(plain[:10]))
    return sum(sum(divmod(p, 10)) for p in products) % 10 == int(plain[10])


def spanish_ssn(value: str) -> bool:
    """Tell whether the last two digits of a Spanish social security number are right."""
    plain = "".join(map(str, _digits(value)))
    if len(plain) != 12 or not 1 <= int(plain[:2]) <= 66:
        return False
    body = int(plain[2:10])
    whole = int(plain[:2]) * 10**7 + body if body < 10**7 else int(plain[:10])
    return whole % 97 == int(plain[10:])


def mrz(value: str) -> bool:
    """Tell whether the check digits of a passport's second machine-readable line are right.

    Source: ICAO Doc 9303, part 3.
    """

    def digit(field: str) -> int:
        worth = (0 if c == "<" else int(c, 36) for c in field)
        return sum(v * (7, 3, 1)[i % 3] for i, v in enumerate(worth)) % 10

    fields = ((value[:9], value[9]), (value[13:19], value[19]), (value[21:27], value[27]))
    return all(c.isdigit() and digit(field) == int(c) for field, c in fields)


def unzr(value: str) -> bool:
    """Tell whether the check digit of a Ukrainian register number (YYYYMMDD-NNNNC) is right."""
    digits = _digits(value)
    if len(digits) != 13:
        return False
    return sum(d * (7, 3, 1)[i % 3] for i, d in enumerate(digits[:12])) % 10 == digits[12]


def nino(value: str) -> bool:
    """Tell whether the letters of a British national insurance number are ever issued."""
    prefix = value[:2].upper()
    return prefix not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}


def calendar_date(value: str) -> bool:
    """Tell whether the numbers of a date can be a day, a month and a year of someone alive."""
    parts = [int(p) for p in "".join(c if c.isdigit() else " " for c in value).split()]
    years = [p for p in parts if 1900 <= p <= 2030]
    rest = [p for p in parts if p not in years or p <= 31]
    return bool(years) and all(1 <= p <= 31 for p in rest) and any(p <= 12 for p in rest)


def public_ip(value: str) -> bool:
    """Tell whether an address is one of a host somewhere: not reserved, private or for examples."""
    if ":" in value and "::" not in value and "." not in value and value.count(":") != 7:
        return False  # such as a date with a time; refusing it by an error takes longer
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def real_mac(value: str) -> bool:
    """Tell whether a hardware address is one of a device, not a pattern of repeated bytes."""
    parts = value.replace("-", ":").lower().split(":")
    return len(set(parts)) > 3


def real_domain(value: str) -> bool:
    """Tell whether an address or link is outside the domains that are reserved for examples.

    Source: RFC 2606, RFC 6761.
    """
    host = value.rpartition("@")[2].lower().strip("/").partition(":")[0].partition("/")[0]
    names = host.strip(".").split(".")
    return names[-1] not in _RESERVED and (len(names) < 2 or names[-2] != "example")


def varied(value: str) -> bool:
    """Tell whether a secret is neither a placeholder, a variable nor one repeated letter."""
    word = value.strip("\"'`").lower()
    if len(set(word)) < 5 or word[:1] in "$%<{[(*" or word.startswith(("your", "my_", "xxx")):
        return False
    fillers = (
        "example",
        "placeholder",
        "changeme",
        "redacted",
        "dummy",
        "sample",
        "xxxx",
        "****",
        "password",
        "passwort",
        "mot_de_passe",
        "contraseña",
        "secret_key",
        "%0a",
    )
    return not any(filler in word for filler in fillers)


def password(value: str) -> bool:
    """Tell whether a word is one that people do not write: digits, signs or capitals inside."""
    if not varied(value) or _EXPRESSION.match(value) is not None:
        return False
    signs = any(c in "!@#$%^&*+?~" for c in value.strip(".,:;!?"))
    capitals = sum(map(str.isupper, value[1:])) >= 2 and any(map(str.islower, value))
    return any(map(str.isalpha, value)) and (any(map(str.isdigit, value)) or signs or capitals)


def strong_password(value: str) -> bool:
    """Tell whether a word looks like a password even where nothing says so."""
    if not password(value) or not any(map(str.isdigit, value)) or _HOST.fullmatch(value):
        return False
    signs = any(c in "!@#$%^&*+?~_" for c in value.strip(".,:;?"))
    return signs or (sum(map(str.isupper, value[1:])) >= 2 and any(map(str.islower, value)))


def mixed(value: str) -> bool:
    """Tell whether a secret is varied and mixes digits, small and large letters, two at least."""
    tests = (str.isdigit, str.islower, str.isupper)
    return varied(value) and sum(any(map(test, value)) for test in tests) >= 2


def has_digit(value: str) -> bool:
    """Tell whether a secret holds a letter and a digit, is varied and no placeholder."""
    if not varied(value) or _EXPRESSION.match(value) is not None:
        return False
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def four_digits(value: str) -> bool:
    """Tell whether at least four digits stand in a value, no placeholder."""
    return len(_digits(value)) >= 4 and placed(value)


def own_date(value: str) -> bool:
    """Tell whether a date is none of those that documentation shows: first of January, zeros."""
    numbers = [int(part) for part in re.findall(r"[0-9]+", value)]
    return sorted(numbers)[:2] != [1, 1] and (not numbers or any(numbers))


def placed(value: str) -> bool:
    """Tell whether digits are no placeholder or table: 000000000, 123456789, 01 02 01 02 01."""
    digits = _digits(value)
    steps = {b - a for a, b in pairwise(digits)}
    few = len(digits) > 8 and len(set(digits)) < 4
    return not few and not _one_digit(digits) and steps not in ({1}, {-1})


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        **{name: partial(_stdnum, name) for name in _STDNUM},
        **{f"phone.{region.lower()}": partial(_phone, region) for region in _REGIONS},
        **{
            check.__name__: check
            for check in (
                luhn,
                card,
                my_number,
                corporate_number,
                steuer_id,
                rvnr,
                kvnr,
                spanish_ssn,
                mrz,
                unzr,
                nino,
                calendar_date,
                public_ip,
                real_mac,
                real_domain,
                varied,
                password,
                strong_password,
                own_secret,
                possible_phone,
                mixed,
                iban,
                resident_id,
                four_digits,
                own_date,
                real_place,
                person,
                filled,
                has_digit,
                placed,
            )
        },
    }
)
"""Every check by the name that rules give."""
