"""The search alone: equal to trying every text, and its rules one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kvkeep.engine.beams import BeamSearch, Ranked, places

VOCAB = 4
END = 3


class Scorer:
    """A random language: the next token's log-probabilities follow from all tokens before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def logprobs(self, text: tuple[int, ...]) -> list[float]:
        weights = np.random.default_rng([self._seed, len(text), *text]).gumbel(size=VOCAB) * 2
        return [float(w) for w in weights - np.log(np.exp(weights).sum())]

    def ranked(self, text: tuple[int, ...], count: int) -> Ranked:
        pairs = sorted(enumerate(self.logprobs(text)), key=lambda pair: -pair[1])
        return tuple(pairs[:count])

    def worth(self, text: tuple[int, ...], penalty: float) -> float:
        total = sum(self.logprobs(text[:i])[token] for i, token in enumerate(text))
        return total / math.pow(len(text), penalty)


def run(search: BeamSearch, scorer: Scorer) -> list[tuple[int, ...]]:
    """Search to the end and return the kept texts, best first."""
    while search.beams:
        texts = [tuple(t.token_id for t in beam.tokens) for beam in search.beams]
        search.advance([scorer.ranked(text, search.wanted) for text in texts])
    return [tuple(t.token_id for t in one.tokens) for one in search.kept]


def every_text(length: int, ending: bool) -> list[tuple[int, ...]]:
    """Return all texts of `length` tokens, and the shorter ones that the end token ends."""
    texts: list[tuple[int, ...]] = []
    for size in range(1, length + 1):
        for text in itertools.product(range(VOCAB), repeat=size):
            ended = ending and text[-1] == END
            if (size == length or ended) and not (ending and END in text[:-1]):
                texts.append(text)
    return texts


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("ending", [False, True])
def test_a_search_wide_enough_finds_the_best_of_all_texts(penalty: float, ending: bool) -> None:
    for seed in range(8):
        scorer, texts = Scorer(seed), every_text(4, ending)
        best = sorted(texts, key=lambda text: -scorer.worth(text, penalty))
        ids = frozenset({END}) if ending else frozenset[int]()
        wide = BeamSearch(len(texts), 4, length_penalty=penalty, ending=ids)
        assert run(wide, scorer) == best
        assert wide.kept[0].score == pytest.approx(scorer.worth(best[0], penalty))


def test_a_search_of_64_beams_finds_the_best_64_of_256_texts() -> None:
    scorer = Scorer(1)
    best = sorted(every_text(4, False), key=lambda text: -scorer.worth(text, 1.0))
    assert run(BeamSearch(64, 4), scorer) == best[:64]


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    scorer, text = Scorer(2), tuple[int, ...]()
    for _ in range(6):
        text = (*text, scorer.ranked(text, 1)[0][0])
    search = BeamSearch(1, 6)
    assert run(search, scorer) == [text]
    assert search.generated == 6


def test_no_text_ends_before_its_shortest_length() -> None:
    scorer = Scorer(2)
    assert min(map(len, run(BeamSearch(6, 5, 0, 1.0, frozenset({END})), scorer))) < 4
    late = run(BeamSearch(6, 5, 4, 1.0, frozenset({END})), scorer)
    assert all(END not in text[:4] for text in late)


def test_the_search_stops_where_no_beam_can_beat_the_worst_kept() -> None:
    """Two texts end at once; the best that goes on is far behind, or just ahead."""
    for other, stops in ((-9.0, True), (-0.5, False)):
        search = BeamSearch(2, 50, length_penalty=0.0, ending=frozenset({8, 9}))
        search.advance([((8, -1.0), (9, -1.1), (0, other), (1, -9.5))])
        if other == -0.5:  # the order is by probability: the beam is first, one text is kept
            assert len(search.kept) == 1
        assert (search.beams == []) is stops


def test_texts_that_end_beyond_the_width_are_not_kept() -> None:
    search = BeamSearch(2, 50, ending=frozenset({7}))
    search.advance([((1, -1.0), (2, -2.0), (7, -3.0))])
    assert search.kept == []
    assert [beam.tokens[0].token_id for beam in search.beams] == [1, 2]


def test_what_is_impossible_is_no_beam() -> None:
    search = BeamSearch(3, 5)
    search.advance([((1, -0.1), (2, -float("inf")), (3, -float("inf")))])
    assert len(search.beams) == 1


def test_closing_keeps_what_runs_and_nothing_without_tokens() -> None:
    search = BeamSearch(2, 50)
    search.close()
    assert search.kept == []
    search = BeamSearch(2, 50)
    search.advance([((1, -1.0), (2, -2.0))])
    search.close()
    assert [one.tokens[0].token_id for one in search.kept] == [1, 2]
    assert search.beams == []


@pytest.mark.parametrize(
    ("parents", "count", "taken"),
    [
        ([0, 0, 0], 1, [0, 1, 2]),
        ([0, 1, 2], 3, [0, 1, 2]),
        ([2, 0, 1], 3, [2, 0, 1]),
        ([1, 1, 1], 3, [1, 0, 2]),
        ([2, 2, 0], 3, [2, 1, 0]),
        ([1, 0], 3, [1, 0]),
        ([0, 0, 1, 1], 2, [0, 2, 1, 3]),
    ],
)
def test_first_children_stay_and_others_take_free_places(
    parents: list[int], count: int, taken: list[int]
) -> None:
    assert places(parents, count) == taken
