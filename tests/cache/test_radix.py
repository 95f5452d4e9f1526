from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvkeep.cache import radix
from kvkeep.cache.radix import Page, PublicChain, RadixIndex, token_bytes
from kvkeep.types import PAGE_TOKENS, PUBLIC_SCOPE, PageTag, chain_hash
from tests.cache.player import DIGEST, prompt

TAG = PageTag("s")


def grow(index: RadixIndex, tokens: list[int], account: str = "a", tag: PageTag = TAG) -> Page:
    """Index a chain and return its last page."""
    node = index.root(DIGEST, account, tag)
    for begin in range(0, len(tokens), PAGE_TOKENS):
        key = token_bytes(tokens[begin : begin + PAGE_TOKENS])
        found = node.children.get(key)
        if found is None:
            found = Page(0, account, tag)
            index.attach(node, found, key)
        node = found
    return node


def test_a_walk_ends_where_tokens_differ() -> None:
    index = RadixIndex(DIGEST)
    last = grow(index, prompt(1, 2, 3))
    root = index.root(DIGEST, "a", TAG)
    assert index.walk(root, token_bytes(prompt(1, 2, 3, 4)))[-1] is last
    assert len(index.walk(root, token_bytes(prompt(1, 2, 4)))) == 2
    assert len(index.walk(root, token_bytes(prompt(1, 2)[:-1]))) == 1
    assert index.walk(root, b"") == []
    assert last.index == 2


def test_hashes_bind_model_tag_and_ancestors() -> None:
    index = RadixIndex(DIGEST)
    last = grow(index, prompt(1, 2))
    first = chain_hash(DIGEST, TAG.digest(), token_bytes(prompt(1)))
    assert last.hash == chain_hash(first, TAG.digest(), token_bytes(prompt(2)))
    other = grow(index, prompt(1, 2), tag=PageTag("s", codec="q2"))
    assert other.hash != last.hash


@pytest.mark.parametrize(
    ("account", "tag"),
    [("b", TAG), ("a", PageTag("t")), ("a", PageTag("s", shield="x")), ("a", PageTag("s", "q2"))],
)
def test_trees_of_other_accounts_and_tags_are_not_found(account: str, tag: PageTag) -> None:
    index = RadixIndex(DIGEST)
    grow(index, prompt(1))
    assert index.find_root(DIGEST, account, tag) is None
    assert index.find_root(DIGEST, "a", TAG) is not None


def test_the_longest_common_start_of_rows_wins() -> None:
    index = RadixIndex(DIGEST)
    root = index.root(DIGEST, "a", TAG)
    for length in (3, 40, 17):
        page = Page(0, "a", TAG)
        index.attach(root, page, token_bytes([5] * length + [length]))
    grow(index, [5] * 30 + [6] * 34)
    found = index.longest_partial(root, token_bytes([5] * 35))
    assert found is not None
    assert (found[0].n_tokens, found[1]) == (41, 35)
    found = index.longest_partial(root, token_bytes([5] * 30 + [6] * 3 + [7]))
    assert found is not None
    assert (found[0].n_tokens, found[1]) == (64, 33)
    assert index.longest_partial(root, token_bytes([9])) is None


def test_common_rows_by_bisection_equal_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 2, rng.integers(1, 65)) for _ in range(2))
        a[0] = b[0]
        n = min(len(a), len(b))
        plain = next((i for i in range(n) if a[i] != b[i]), n)
        assert radix._common_rows(token_bytes(a.tolist()), token_bytes(b.tolist()), 1) == plain


def test_only_leaves_leave_and_an_empty_tree_goes() -> None:
    index = RadixIndex(DIGEST)
    last = grow(index, prompt(1, 2))
    first = last.parent
    assert first is not None
    with pytest.raises(RuntimeError, match="leaf"):
        index.detach(first)
    root = first.parent
    assert root is not None
    assert index.leaves_first(root) == [last, first]
    index.detach(last)
    index.detach(first)
    assert not list(index.roots())
    with pytest.raises(RuntimeError, match="root again"):
        index.attach(root, Page(0, "a", TAG), token_bytes(prompt(1)))


def test_public_pages_are_found_by_hash() -> None:
    index = RadixIndex(DIGEST)
    page = grow(index, prompt(1), account="public", tag=PageTag(PUBLIC_SCOPE))
    grow(index, prompt(1))
    assert index.public_pages == {page.hash: page}
    index.detach(page)
    assert not index.public_pages


def test_a_public_chain_is_computed_only_as_far_as_asked() -> None:
    tokens = np.array(prompt(1, 2, 3, tail=5), np.int32)
    digest = PageTag(PUBLIC_SCOPE).digest()
    chain = PublicChain(DIGEST, digest, tokens, 3)
    assert len(chain) == 3
    assert chain._known == []
    assert chain[0] == chain_hash(DIGEST, digest, token_bytes(prompt(1)))
    assert len(chain._known) == 1
    assert chain[-1] == chain_hash(chain[1], digest, token_bytes(prompt(3)))
    assert chain[1:] == (chain[1], chain[2])
    assert chain[3:] == ()
    with pytest.raises(IndexError):
        _ = chain[3]
    everything: Iterator[bytes] = iter(chain)
    assert list(everything) == chain._known
