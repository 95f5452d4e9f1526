from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from kvkeep.errors import CheckpointError
from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.features import (
    BITS,
    FEATURES,
    LEXICON_BITS,
    Lexicon,
    hint_row,
    name_codes,
    tokenise,
)
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.scorer import (
    MARGIN,
    NEAR,
    WIDE,
    Hints,
    LearnedScorer,
    RulesAndScorer,
    load_weights,
    runs,
    shifted,
    windows,
)
from kvkeep.sharing.detector.scorer import _counts as counts
from kvkeep.sharing.detector.spans import CATEGORIES, Recogniser, Span, Verdict

SHIPPED = Path(str(files("kvkeep.sharing.detector") / "scorer.npz"))


@pytest.fixture(scope="module")
def rules() -> RuleRecogniser:
    return RuleRecogniser(shipped_rules())


@pytest.fixture(scope="module")
def scorer(rules: RuleRecogniser) -> LearnedScorer:
    return LearnedScorer(rules)


def test_shipped_weights_are_small_and_carry_their_digest(scorer: LearnedScorer) -> None:
    assert SHIPPED.stat().st_size <= 5_000_000
    weights = load_weights()
    assert weights.table.shape[0] == 2**BITS
    assert not weights.table[0].any()
    assert {category for _, category in weights.kinds} <= CATEGORIES
    assert scorer.version == f"2-{weights.digest[:12]}"


def altered(tmp_path: Path, name: str, change: object) -> Path:
    with np.load(SHIPPED) as stored:
        arrays = {key: stored[key] for key in stored.files}
    arrays[name] = np.asarray(change(arrays[name]) if callable(change) else change)
    path = tmp_path / "scorer.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    path = altered(tmp_path, "out_bias", lambda bias: bias + 1)
    with pytest.raises(CheckpointError, match="altered"):
        load_weights(path)


def test_altered_calibration_is_refused(tmp_path: Path) -> None:
    def steeper(meta: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> object:
        return np.frombuffer(bytes(meta).replace(b'"slopes": [', b'"slopes": [1'), np.uint8)

    with pytest.raises(CheckpointError, match="altered"):
        load_weights(altered(tmp_path, "meta", steeper))


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    def older(meta: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> object:
        text = bytes(meta).replace(b'"version": 2', b'"version": 1')
        return np.frombuffer(text, np.uint8)

    with pytest.raises(CheckpointError, match="another version"):
        load_weights(altered(tmp_path, "meta", older))


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_missing_or_broken_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "scorer.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="can't be read"):
        load_weights(path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scorer.npz"
    shutil.copy(SHIPPED, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_weights(path)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 448, 449, 1000, 4096])
def test_windows_keep_each_token_once_with_its_surroundings(count: int) -> None:
    kept: list[int] = []
    for window in windows(count):
        kept += range(window.keep_from, window.keep_to)
        reach = max(NEAR) + max(WIDE)
        assert window.keep_from == 0 or window.keep_from - window.start >= reach
        assert window.keep_to == count or window.end - window.keep_to >= reach
        assert window.end - window.start <= 256
    assert kept == list(range(count))
    assert max(NEAR) + max(WIDE) < MARGIN


def test_a_text_of_many_windows_is_scored_as_one(scorer: LearnedScorer) -> None:
    tokens = tokenise("The invoice was sent to Anna Becker in the Lindenstraße 4. " * 60)
    assert len(tokens.starts) > 600
    logits = scorer.logits(tokens)
    w = load_weights()
    rows = w.table[tokens.features].sum(axis=1, dtype=np.float32)
    near = np.maximum(shifted(rows, NEAR) @ w.near + w.near_bias, 0)
    whole = np.maximum(shifted(near, WIDE) @ w.wide + w.wide_bias, 0) @ w.out + w.out_bias
    np.testing.assert_allclose(logits, whole, atol=1e-3)


def test_neighbours_beyond_the_edges_are_zero() -> None:
    rows = np.arange(1, 4, dtype=np.float32)[:, None]
    assert shifted(rows, (-1, 0, 1)).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0]]


def test_runs_bridge_small_gaps_alone() -> None:
    scores = np.array([0.9, 0, 0, 0.4, 0, 0, 0, 0.3, 0.29], np.float32)
    assert runs(scores) == [(0, 3), (7, 7)]


@pytest.mark.parametrize("text", ["", " ", "\t  ", "\u200b"])
def test_text_without_tokens_has_no_spans(scorer: LearnedScorer, text: str) -> None:
    assert scorer.spans(text) == []
    assert scorer.odds(tokenise(text)).shape[0] == 0


@pytest.mark.parametrize(
    ("text", "category", "part"),
    [
        ("J'habite au 12 rue Victor-Hugo, 21000 Dijon.", "location", "Victor-Hugo"),
        ("Paciente con fluoxetina 20 mg dos veces al día.", "health", "fluoxetina"),
        ("私の名前は田中美香です。", "person", "田中"),
        ("Soffro di sclerosi multipla.", "health", "sclerosi"),
        ("Abito in via Garibaldi 14, 40121 Bologna.", "location", "Garibaldi"),
        ("住所は東京都新宿区本町3-12-4です。", "location", "新宿区"),
        ("我被诊断为抑郁症。", "health", "抑郁症"),
    ],
)
def test_free_text_of_each_language_is_found(
    scorer: LearnedScorer, text: str, category: str, part: str
) -> None:
    found = scorer.spans(text)
    at = text.index(part)
    assert any(s.category == category and s.start < at + len(part) and s.end > at for s in found)
    assert all(s.source == "scorer" and 0.3 <= s.score <= 1 for s in found)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Hello, my name is Patricia Holmes and I need help.", "person"),
        ("Mein Name ist Jürgen Schäfer.", "person"),
        ("Мене звати Оксана Ткачук.", "person"),
    ],
)
def test_plain_statements_are_found(scorer: LearnedScorer, text: str, category: str) -> None:
    assert any(span.category == category for span in scorer.spans(text))


@pytest.mark.parametrize(
    ("kind", "text", "counted"),
    [
        ("person_name", "Signor", False),
        ("person_name", "Signor Rossi", True),
        ("address", "Via Roma 1", False),
        ("address", "123", False),
        ("address", "Via Roma 12", True),
        ("diagnosis", "Signor", True),
        ("employer", "馬", False),
        ("person_name", "王", False),
        ("person_name", "王芳", True),
        ("date_of_birth", "01.01.1970", False),
        ("date_of_birth", "14.03.1987", True),
        ("date_of_birth", "14 березня", True),
    ],
)
def test_what_forms_show_does_not_count(kind: str, text: str, counted: bool) -> None:
    assert counts(Span(0, len(text), kind, "person", 0.9, "scorer"), text) is counted


def test_a_part_of_a_forms_street_does_not_count() -> None:
    text = "Mario Rossi, Via Roma 1, 00100 Roma; Via Roma 12"
    assert not counts(Span(17, 23, "address", "location", 0.9, "scorer"), text)
    assert counts(Span(41, 48, "address", "location", 0.9, "scorer"), text)


def test_the_first_half_of_a_samples_name_does_not_count() -> None:
    text = "Marie Exemple, Marie Lenoir"
    assert not counts(Span(0, 5, "person_name", "person", 0.9, "scorer"), text)
    assert not counts(Span(0, 13, "person_name", "person", 0.9, "scorer"), text)
    assert counts(Span(15, 20, "person_name", "person", 0.9, "scorer"), text)


def test_a_part_of_a_date_counts_as_the_whole() -> None:
    text = "born 1970-01-01, 1987-03-14"
    assert not counts(Span(5, 9, "date_of_birth", "date", 0.9, "scorer"), text)
    assert counts(Span(22, 24, "date_of_birth", "date", 0.9, "scorer"), text)


def test_a_form_of_address_is_no_find(scorer: LearnedScorer) -> None:
    text = "Signor Presidente, onorevoli colleghi,"
    assert not any(span.kind == "person_name" for span in scorer.spans(text))


def test_no_bound_is_set_by_what_forms_show(scorer: LearnedScorer) -> None:
    for name, counted in (("Max Mustermann", False), ("Max Weidenhof", True)):
        text = f"Mein Name ist {name}."
        tokens = tokenise(text)
        odds = np.full((len(tokens.starts), len(load_weights().kinds)), -5, np.float32)
        odds[3:5] = 4
        left = scorer.without_fillers(text, tokens, odds)
        column = [kind for kind, _ in load_weights().kinds].index("person_name")
        assert (left[3:5, column] == 4).all() == counted
        assert (left[:, column + 1] == odds[:, column + 1]).all()


def test_scoring_is_deterministic(scorer: LearnedScorer) -> None:
    text = "Patient Maria Koch, geb. 3.4.1961, wohnt Am Bach 7 in Ulm."
    assert scorer.spans(text) == scorer.spans(text)
    assert scorer.spans(text) == LearnedScorer(scorer.hints.rules).spans(text)


def test_a_scorer_that_fails_leaves_the_chain_private() -> None:
    class Broken:
        def spans(self, text: str) -> list[object]:
            raise RuntimeError("weights are gone")

    broken: Recogniser = Broken()  # type: ignore[assignment]
    assert Detector([broken]).scan("all is well").verdict is Verdict.TAINT


@pytest.mark.parametrize("text", ["a\ufffdb", "\U0001f600 ok", "é" * 5000, "\x00\x01", "中" * 3000])
def test_any_text_is_scored_without_an_error(scorer: LearnedScorer, text: str) -> None:
    for span in scorer.spans(text):
        assert 0 <= span.start < span.end <= len(text)


def test_features_have_one_row_per_token_and_none_is_out_of_the_table() -> None:
    tokens = tokenise("Ana (33) 中文テ\n+49")
    assert len(tokens.starts) == 10
    assert tokens.features.shape == (10, FEATURES)
    assert tokens.features.min() >= 0
    assert tokens.features.max() < 2**BITS


def test_digits_share_features_and_case_does_not_hide_a_name() -> None:
    one, other = tokenise("on 12"), tokenise("on 34")
    assert (one.features == other.features).all()
    lower, upper = tokenise("anna"), tokenise("Anna")
    assert (lower.features == upper.features).mean() > 0.8


def test_a_name_is_looked_up_as_a_text_holds_it() -> None:
    known = Lexicon.of([["Анна", "王", "Joan Miró"], ["美咲", "Ann Lee Roy"]])
    tokens = tokenise("анна saw Joan Miro, Joan and 美咲 王; Ann Lee", known)
    word, longer = tokens.features[:, -3], tokens.features[:, -2]
    assert np.flatnonzero(word).tolist() == [0, 9]
    assert np.flatnonzero(longer).tolist() == [2, 3, 7, 11, 12]
    assert len({*longer[longer > 0]}) == 2
    assert not tokenise("анна 王", None).features[:, -3:].any()


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("", 0),
        ("Ann", 1),
        ("Ann Lee", 1),
        ("Ann van Lee", 2),
        ("王", 1),
        ("王芳", 1),
        ("王" * 5, 0),
    ],
)
def test_a_name_has_a_code_for_each_pair_of_words(name: str, codes: int) -> None:
    assert len(name_codes(name)) == codes


def test_few_words_are_taken_for_names_that_are_none() -> None:
    known = Lexicon.of([[f"n{letter}x{at}" for letter in "abcdefgh" for at in range(2500)]])
    assert known.bits.shape == (2**LEXICON_BITS,)
    words = tokenise(" ".join(f"w{'ijklmnopqr'[at % 10] * (at // 10)}" for at in range(1, 3000)))
    assert len(words.starts) > 2000
    strangers = tokenise("the server writes the file and the client reads it " * 40, known)
    assert not strangers.features[:, -3].any()


def test_what_the_rules_found_stands_at_its_tokens() -> None:
    grey = Span(5, 12, "person_name", "person", 0.6, "rule")
    sure = Span(9, 12, "email", "contact", 1.0, "rule")
    column = tokenise("call Ann Lee now", hints=[sure, grey]).features[:, -1]
    person, mail = (hint_row(span.kind, span.verdict) for span in (grey, sure))
    assert column.tolist() == [0, person, mail, 0]
    assert hint_row("email", Verdict.GREY) != mail


def test_the_scorer_is_told_of_words_that_rules_ask_more_of(rules: RuleRecogniser) -> None:
    hints = Hints(rules)
    assert rules.spans("A leaflet on asthma.") == []
    told = hints.of("A leaflet on asthma.")
    assert {(span.kind, span.verdict) for span in told} == {("diagnosis", Verdict.CLEAR)}
    assert hints.of("the server restarts at night") == []


def test_rules_and_scorer_are_read_together(rules: RuleRecogniser, scorer: LearnedScorer) -> None:
    both = RulesAndScorer(rules)
    text = "Patient Maria Koch, geb. 3.4.1961, maria.koch@web.de"
    assert both.spans(text) == [*rules.spans(text), *scorer.spans(text)]
    assert rules.version in both.version
    assert scorer.version in both.version


def test_an_accent_does_not_hide_a_word() -> None:
    one, other = tokenise("dépression"), tokenise("depression")
    assert (one.features == other.features).all()
    assert (tokenise("й").features != tokenise("и").features).any()
