from __future__ import annotations

from typing import Any

from tools.check_coverage import violations


def report(**percent: int) -> dict[str, Any]:
    files = {
        f"src/kvkeep/{name}.py": {
            "summary": {
                "covered_lines": hit,
                "num_statements": 100,
                "covered_branches": 0,
                "num_branches": 0,
            }
        }
        for name, hit in percent.items()
    }
    return {"files": files}


def test_floors_held() -> None:
    assert not list(violations(report(config=100, engine=80), {"all": 90, "config.py": 100}))


def test_a_missed_line_breaks_its_floor() -> None:
    (found,) = violations(report(config=99, engine=80), {"all": 80, "config.py": 100})
    assert "config.py 99.0 %" in found


def test_a_floor_for_nothing_breaks() -> None:
    (found,) = violations(report(config=100), {"gone.py": 50})
    assert "gone.py" in found
