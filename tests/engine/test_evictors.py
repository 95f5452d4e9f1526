"""The techniques that options ask for."""

from __future__ import annotations

import msgspec
import pytest

from kvkeep.config import DEMO_MODEL
from kvkeep.engine.evictors import evictor_of
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import PRESETS, Corm
from kvkeep.eviction.policy import KeepAll

OFF = EngineOptions(model=str(DEMO_MODEL))


def options(**changes: object) -> EngineOptions:
    return msgspec.structs.replace(OFF, **changes)


def test_presets_and_what_is_changed_of_them() -> None:
    assert isinstance(evictor_of(OFF), KeepAll)
    for name, preset in PRESETS.items():
        found = evictor_of(options(evict=name))
        assert isinstance(found, Corm)
        assert found.options == preset
    found = evictor_of(options(evict="corm", evict_window=300, evict_weight=2.0, evict_cap=900))
    assert isinstance(found, Corm)
    assert (found.options.window, found.options.weight, found.options.cap) == (300, 2.0, 900)
    assert found.options.recent == PRESETS["corm"].recent
    assert found.options.prompt_rows == PRESETS["corm"].prompt_rows
    assert found.options.most == PRESETS["corm"].most
    asked = evictor_of(options(evict="corm", evict_most=0.25))
    assert isinstance(asked, Corm)
    assert asked.options.most == 0.25
    narrow = evictor_of(options(evict="corm", evict_window=24))
    assert isinstance(narrow, Corm)
    assert narrow.options.prompt_rows == 24


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"evict": "h2o"}, "use off, corm or corm-paper"),
        ({"evict_cap": 900}, "evict_cap is given and evict is off; set evict to corm"),
        ({"evict": "corm", "evict_window": 0}, "evict_window is 0"),
        ({"evict": "corm", "evict_window": 8, "evict_prompt_rows": 9}, "evict_prompt_rows is 9"),
        ({"evict": "corm", "evict_most": 1.5}, "evict_most is 1.5"),
        ({"evict": "corm-paper", "evict_cap": 100}, "raise it to 260 or more"),
    ],
)
def test_bad_options_are_refused_at_start(changes: dict[str, object], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        evictor_of(options(**changes))
