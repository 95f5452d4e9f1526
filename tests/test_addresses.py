"""Who can reach an address."""

import pytest

from kvkeep.addresses import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_this_machine_alone_reaches_these(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "[::]", "example.org", ""])
def test_others_may_reach_these(host: str) -> None:
    assert not is_loopback(host)
