from __future__ import annotations

import pytest

from kvkeep.sharing.detector.checks import CHECKS

GOOD_AND_BAD = [
    ("card", "4666 1760 3137 2159", "4666 1760 3137 2158"),
    ("card", "373613412524273", "3736134125242730"),
    ("card", "30569309025904", "0000000000000000"),
    ("card", "6011000990139424", "9011000990139420"),
    ("card", "6304000000000000", "6304000000000001"),
    ("my_number", "173570442793", "173570442794"),
    ("my_number", "1735 7044 2793", "000000000000"),
    ("my_number", "1735 7044 2793", "17357044279"),
    ("corporate_number", "T7774548037213", "T7774548037214"),
    ("steuer_id", "13570869260", "11111111111"),
    ("rvnr", "25150872K380", "25150872K381"),
    ("kvnr", "V792553780", "V792553781"),
    ("spanish_ssn", "284709186349", "994709186349"),
    ("spanish_ssn", "281234567840", "28123456784"),
    (
        "mrz",
        "LC05209029UTO7408122F3204153<<<<<<<<<<<<<<<0",
        "L" + "C05209028UTO7408122F3204153<<<<<",
    ),
    ("unzr", "19900515-52272", "19900515-5227"),
    ("nino", "JG103759A", "GB103759A"),
    ("own_date", "1987-03-14", "1990-01-01"),
    ("own_date", "1.2.1990", "01.01.2000"),
    ("own_date", "14 March", "0000-00-00"),
    ("calendar_date", "14.03.1987", "45.13.1987"),
    ("public_ip", "91.198.174.192", "10.0.0.1"),
    ("public_ip", "2a02:2e0:3fe:1001:7777:772e:2:85", "x"),
    ("real_mac", "3c:22:fb:9a:10:7e", "00:00:00:00:00:00"),
    ("real_domain", "a@firma.de", "a@mail.example"),
    ("real_domain", "a@host", "getty@tty1.service"),
    ("varied", "hunter2x", "xxxxxxxxxx"),
    ("varied", "tr0ub4dor", "${PASSWORD}"),
    ("varied", "tr0ub4dor", "changeme-now"),
    ("varied", "tr0ub4dor", "passphrase!%0AEnter"),
    ("password", "hunter2isgood", "required"),
    ("password", "SecretAlDNY", "auth[2]xyz"),
    ("strong_password", "kyiv_409#", "hunter2isgood"),
    ("strong_password", "abCD12efG", "SecretAlDNY"),
    ("strong_password", "kyiv_409#", "@localhost:5432/app"),
    ("own_secret", "s3cr", "password"),
    ("mixed", "AbcdefghijK", "token-of-project"),
    ("has_digit", "abcdefg1", "abcdefgh"),
    ("has_digit", "abcdefg1", "os.environ[1]"),
    ("placed", "482913", "123456"),
    ("placed", "482913", "987654"),
    ("placed", "0120-444-444", "01 02 01 02 01"),
    ("four_digits", "FA502613", "FA502"),
    ("real_place", "221 Baker Street", "1 Example Road"),
    ("real_place", "221 Baker Street", "10 Downing Street"),
    ("real_place", "11 rue de la Paix", "1 rue de la Paix"),
    ("real_place", "Via Roma 12", "Via Roma, 1"),
    ("real_place", "75012 Paris", "75000 Paris"),
    ("person", "Orla Whitfield", "John Doe"),
    ("filled", "mumps", "string"),
    ("iban", "DE69748338014126906044", "DE69748338014126906045"),
    ("resident_id", "110105198709129506", "110105198709129507"),
    ("possible_phone", "+1 415 671 2345", "+1-555-0123"),
    ("possible_phone", "+49 30 901820", "+35236450.6"),
    ("possible_phone", "+49 30 901820", "+999"),
    ("possible_phone", "+49 30 901820", "+000000000"),
    ("phone.de", "030 901820", "0123456789"),
    ("phone.de", "030 901820", "01.03.1970"),
    ("possible_phone", "+49 30 901820", "4829133"),
    ("phone.us", "(415) 671-2345", "+000123"),
    ("phone.us", "(415) 671-2345", "x"),
    ("luhn", "692 844 947", "692 844 948"),
    ("luhn", "0", ""),
    ("iban", "DE69 7483 3801 4126 9060 44", ""),
    ("iban", "DE69-7483-3801-4126-9060-44", "DE69/748338014126906044"),
    ("public_ip", "2a02:2e0:3fe::85", "2024:10:31:12"),
    ("public_ip", "::ffff:91.198.174.192", "1:2:3:4:5:6:7:8:9"),
]


@pytest.mark.parametrize(("name", "good", "bad"), GOOD_AND_BAD)
def test_a_check_tells_good_from_bad(name: str, good: str, bad: str) -> None:
    assert CHECKS[name](good)
    assert not CHECKS[name](bad)


def test_every_check_of_our_own_is_in_the_table() -> None:
    ours = {name for name, check in CHECKS.items() if hasattr(check, "__name__")}
    assert ours <= {name for name, _, _ in GOOD_AND_BAD}
