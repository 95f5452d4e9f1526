from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.audit import Report
from kvkeep.audit.channel import Facts, Observable
from kvkeep.audit.findings import Finding
from kvkeep.audit.sequential import Rates
from kvkeep.cli import attack, run

KEYS = ["--key", "a=key-one", "--key", "b=key-two"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["http://127.0.0.1:9"], "key: an audit needs two tenants"),
        (["http://127.0.0.1:9", "--key", "key-one", "--key", "b=key-two"], "key: number 1"),
        (["http://127.0.0.1:9", *KEYS, "--channels", "nope"], "channels: there is no 'nope'"),
        (["http://127.0.0.1:9", *KEYS, "--seconds", "0"], "seconds: must be more than 0"),
        (["ftp://127.0.0.1", *KEYS], "url: needs http://"),
        (["http://example.org", *KEYS], "consent: example.org is not this machine"),
        (["http://127.0.0.1:9", *KEYS, "--json", "/none/a.json"], "json: there is no folder /none"),
        (["http://127.0.0.1:9", *KEYS, "--html", "/none/a.html"], "html: there is no folder /none"),
        (["http://127.0.0.1:9", *KEYS], "url: no server answers at http://127.0.0.1:9"),
    ],
)
def test_errors_are_one_sentence_that_names_the_field(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["attack", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"kvkeep: {says}")
    assert shown.err.count("\n") == 1
    assert "key-one" not in shown.out + shown.err
    assert "key-two" not in shown.out + shown.err


def test_a_report_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"^json: can't write"):
        attack.write(tmp_path / "no" / "such.json", "{}", "json")
    attack.write(None, "{}", "json")


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("leak", 3), ("void", 4)])
def test_exit_codes(verdict: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = Finding(Facts("no_key", "", Observable.TTFT), "skipped", "refused")
    report = Report(
        target="http://127.0.0.1:9/",
        model="m",
        seed=1,
        rates=Rates(0.05, 0.05),
        prompt_tokens=256,
        seconds=1.0,
        requests=10,
        unequal_pairs=0,
        verdict=verdict,  # type: ignore[arg-type]
        reason="because",
        controls=(),
        channels=(skipped,),
    )
    assert report.exit_code == code
    attack.show(report)
    assert f"{verdict}: because (10 requests" in capsys.readouterr().out
