from __future__ import annotations

import random

import pytest

from veneer.data import duplicates
from veneer.data.duplicates import digest, exact, near

WORDS = [f"{random.Random(n).getrandbits(28):x}" for n in range(3000)]


def sentences(count: int, seed: int = 0, words: int = 30) -> list[str]:
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=words)) for _ in range(count)]


def test_exact() -> None:
    keys = [digest(text) for text in ("a", "b", "a", "A", "b")]
    assert exact(keys) == [2, 4]
    assert exact(keys, [digest("b")]) == [1, 4]


def test_near_duplicates_are_found_and_nothing_else() -> None:
    texts = sentences(300)
    changed = texts[17].replace(" ", "  ", 3).upper() + "!"
    swapped = texts[200].split()
    swapped[10] = "somewhere"
    texts[250], texts[251] = changed, " ".join(swapped)
    texts[252] = texts[3]  # exactly equal: not nearly
    assert near(texts) == {250: 17, 251: 200}


def test_against_other_texts() -> None:
    known = sentences(200)
    fresh = sentences(50, seed=1)
    fresh[5] = known[100] + "."
    fresh[6] = known[101]
    fresh[8] = fresh[7] + "."
    assert near(fresh, known) == {5: 100}


def test_common_wording_makes_no_duplicates() -> None:
    """A prompt's fixed words would make all rows alike."""
    wording = "Read the message below and say in one word what it is about. " + sentences(1, seed=2, words=100)[0]
    texts = [wording + text for text in sentences(200, words=12)]
    texts[150] = texts[20] + "."
    assert near(texts) == {150: 20}


def _pairs(similarity: float) -> tuple[list[str], list[str]]:
    """Texts, and others that share so much of them with each that their shingles are about so similar."""
    texts = sentences(200, words=60)
    changed = []
    for number, text in enumerate(texts):
        kept = int(len(text) * 2 * similarity / (1 + similarity))
        changed.append(text[:kept] + "".join(random.Random(number).choices("xyzkqj", k=len(text) - kept)))
    return texts, changed


@pytest.mark.parametrize("similarity", [0.83, 0.9])
def test_few_are_missed(similarity: float) -> None:
    texts, changed = _pairs(similarity)
    shingles = duplicates._Shingles([*texts, *changed])
    true = [i for i in range(200) if shingles.similarity(i, 200 + i) >= duplicates.SIMILAR]
    found = near([*texts, *changed])
    assert len(true) > 150
    assert sum(200 + i in found for i in true) >= 0.95 * len(true)
    assert all(found[i] == i - 200 for i in found)


def test_what_is_not_similar_enough_is_not_called_a_duplicate() -> None:
    texts, changed = _pairs(0.7)
    assert len(list(duplicates._candidates(duplicates._Shingles([*texts, *changed]).signatures()))) > 100
    assert near([*texts, *changed]) == {}


def test_of_very_much_text_a_part_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, changed = _pairs(0.95)
    monkeypatch.setattr(duplicates, "_BUDGET", sum(map(len, texts)) // 4)
    found = near([*texts, *changed])
    assert len(found) > 190
    shingles = duplicates._Shingles([*texts, *changed])
    assert len(shingles.of(0, part=True)) < len(shingles.of(0)) / 4
    assert all(shingles.similarity(one, other) >= duplicates.SIMILAR for other, one in found.items())


def test_short_and_odd_texts() -> None:
    assert near(["", "a", "b", "", "\ud800"]) == {}
    assert near([]) == {}
    assert near(["yes", "no", "yes."] * 20) == {}


def test_of_very_many_rows_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert duplicates.sample(5) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(duplicates, "MOST", 10)
    chosen = duplicates.sample(1000)
    assert len(chosen) == 10
    assert chosen[0] == 0
    assert chosen[-1] == 999
