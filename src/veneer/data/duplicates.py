"""Rows that say the same, exactly or nearly.

Two texts are near duplicates when their sets of shingles (runs of 8 bytes of the text in lower case, white space
made even) have a Jaccard similarity of at least `SIMILAR`. Candidates come from MinHash signatures in bands (Broder
1997; Leskovec, Rajaraman & Ullman, *Mining of Massive Datasets*, ch. 3): 8 bands of 4, so that a pair of similarity
0.8 is looked at with 98 %, one of 0.9 with 99.98 %; every candidate's similarity is then computed exactly, so nothing
is called a duplicate that isn't. Shingles that many rows share, such as those of a prompt's fixed wording, say
nothing about two of them and are left out. Of very much text, signatures are made of a part of the shingles, chosen by
their hashes, so the same in every text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy
from numpy.typing import NDArray

SIMILAR = 0.8
MOST = 100_000
"""Near duplicates are looked for among this many rows at most."""

_WIDTH = 8
_BANDS, _ROWS = 8, 4
_COMMON = 0.2
"""Shingles in more than this share of the rows are wording."""
_SAMPLE = 2000
_FEW = 20
"""With fewer rows than this, nothing can be told to be wording."""
_LONGEST = 20_000
"""Characters of a text that are looked at."""
_BUDGET = 20_000_000
"""Shingles that signatures are made of, in all texts together."""
_CHUNK = 2000

_Hashes = NDArray[numpy.uint64]


def digest(text: str) -> bytes:
    """What stands for a text where only equality counts."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def exact(digests: Sequence[bytes], among: Sequence[bytes] | None = None) -> list[int]:
    """Indices of texts equal to an earlier one; or to any of ``among``, if that is given."""
    seen = set(among or ())
    found = []
    for index, key in enumerate(digests):
        if key in seen:
            found.append(index)
        elif among is None:
            seen.add(key)
    return found


def near(texts: Sequence[str], among: Sequence[str] | None = None) -> dict[int, int]:
    """Index of a text -> index of one nearly, but not exactly equal to it: earlier in ``texts``, or in ``among``."""
    everything = [*(among or ()), *texts]
    start = len(everything) - len(texts)
    chosen = _distinct(everything)
    shingles = _Shingles([everything[index] for index in chosen])
    found: dict[int, int] = {}
    for earlier, later in _candidates(shingles.signatures()):
        one, other = int(chosen[earlier]), int(chosen[later])
        if other < start or (among is not None and one >= start) or other - start in found:
            continue
        if shingles.similarity(earlier, later) >= SIMILAR:
            found[other - start] = one if among is not None else one - start
    return found


def sample(rows: int) -> list[int]:
    """Indices of the rows to look for near duplicates among: all of them, or evenly spread ones if they are many."""
    return list(range(rows)) if rows <= MOST else numpy.linspace(0, rows - 1, MOST).astype(int).tolist()


def _distinct(texts: Sequence[str]) -> NDArray[numpy.int64]:
    """Indices of the texts that differ from all before."""
    repeated = set(exact([digest(text) for text in texts]))
    kept = [index for index in range(len(texts)) if index not in repeated]
    return numpy.array(kept, dtype=numpy.int64)


class _Shingles:
    """The shingles of each text, without what is wording, as hashes."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [" ".join(text[:_LONGEST].lower().split()).encode("utf-8", "replace") for text in texts]
        share = min(1.0, _BUDGET / max(sum(map(len, self.texts)), 1))
        self.highest = numpy.uint64(min(int(share * 2**64), 2**64 - 1))
        self.common = self._wording()

    def of(self, index: int, *, part: bool = False) -> _Hashes:
        """Those of a text; or the part of them that signatures are made of."""
        found = _hashes(self.texts[index])
        found = numpy.unique(found[found <= self.highest] if part else found)
        return found[~numpy.isin(found, self.common)] if len(self.common) else found

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two texts."""
        a, b = self.of(one), self.of(other)
        both = len(numpy.intersect1d(a, b, assume_unique=True))
        return both / max(len(a) + len(b) - both, 1)

    def signatures(self) -> _Hashes:
        """MinHash signatures ``[texts, bands × rows]``; random where nothing but wording is left."""
        generator = numpy.random.default_rng(0)
        factors = generator.integers(1, 2**63, _BANDS * _ROWS, dtype=numpy.uint64) | numpy.uint64(1)
        result = generator.integers(0, 2**63, (len(self.texts), len(factors)), dtype=numpy.uint64)
        for start in range(0, len(self.texts), _CHUNK):
            parts = [self.of(index, part=True) for index in range(start, min(start + _CHUNK, len(self.texts)))]
            filled = numpy.array([index for index, part in enumerate(parts) if len(part)], dtype=numpy.int64)
            if not len(filled):
                continue
            joined = numpy.concatenate([parts[index] for index in filled])
            begins = numpy.cumsum([0, *(len(parts[index]) for index in filled[:-1])])
            for column, factor in enumerate(factors):
                mixed = joined * factor
                mixed ^= mixed >> numpy.uint64(29)
                result[start + filled, column] = numpy.minimum.reduceat(mixed, begins)
        return result

    def _wording(self) -> _Hashes:
        if len(self.texts) < _FEW:
            return numpy.empty(0, dtype=numpy.uint64)
        some = numpy.linspace(0, len(self.texts) - 1, min(_SAMPLE, len(self.texts))).astype(int)
        every = numpy.concatenate([numpy.unique(_hashes(self.texts[index])) for index in some])
        values, counts = numpy.unique(every, return_counts=True)
        return values[counts > _COMMON * len(some)]


def _hashes(text: bytes) -> _Hashes:
    """One number for each run of 8 bytes."""
    data = numpy.frombuffer(text.ljust(_WIDTH, b"\0"), dtype=numpy.uint8)
    windows = numpy.lib.stride_tricks.sliding_window_view(data, _WIDTH)
    values = numpy.ascontiguousarray(windows).view(numpy.uint64).ravel()
    return _scrambled(values)


def _scrambled(values: _Hashes) -> _Hashes:
    """SplitMix64's finaliser: neighbouring values come out unrelated."""
    values = (values ^ (values >> numpy.uint64(30))) * numpy.array([0xBF58476D1CE4E5B9], dtype=numpy.uint64)
    values = (values ^ (values >> numpy.uint64(27))) * numpy.array([0x94D049BB133111EB], dtype=numpy.uint64)
    return values ^ (values >> numpy.uint64(31))


def _candidates(signatures: _Hashes) -> Iterator[tuple[int, int]]:
    """Pairs that agree in a whole band, the earlier first: each row with the first such one and the one before."""
    for band in range(_BANDS):
        part = signatures[:, band * _ROWS : (band + 1) * _ROWS]
        key = _scrambled(part[:, 0])
        for column in range(1, _ROWS):
            key = _scrambled(key + part[:, column])
        order = numpy.argsort(key, kind="stable")
        same = key[order][1:] == key[order][:-1]
        first = -1
        for position in numpy.flatnonzero(same):
            before, after = int(order[position]), int(order[position + 1])
            if position == 0 or not same[position - 1]:
                first = before
            yield first, after
            if before != first:
                yield before, after
